"""Data: shard index → permutation → samples → joint augmentation → batches. Knows no model.

index.py          what a shard set is, and why a folder is not one      (no torch)
tar_format.py     how a sample lies in a tar: headers, span, checksum   (no torch)
webdataset_index.py  an index for WebDataset tars that exist already (no torch)
writer.py         reproducible tars, members table, index               (no torch)
locate.py         from a run file's word for a set to its folder        (no torch)
packaged.py       sets made from installed packages                     (no torch)
remote.py         sets on a server, fetched shard by shard into a cache (no torch)
permutation.py    which sample comes at which position of an epoch
sampler.py        which samples a micro-batch of a rank holds
samples.py        bytes of one sample
decoding.py       bytes of an image to pixels; crop_decoding.py, of a crop alone
class_folders.py  class folders, listed into the cache and read as they lie (no torch)
score_maps.py     records of top-k class logits at every location of an image
augment.py        random views of an image, and where they came from
dataset.py        micro-batches by number
shared_memory.py  batches from worker processes, through reused buffers
workers.py        what became of a loader worker that died
loader.py         batches of this rank, from a position on
normalize.py      on the device: uint8 pixels to what the model takes
mixing.py         on the device: mixup and CutMix of images and targets
targets.py        on the device: class and patch targets, out of labels or (dense_targets.py) score maps
"""
