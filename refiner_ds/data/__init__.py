"""Data: shard index → global order → samples → joint augmentation → batches. Knows no model.

index.py     what a shard set is, and refusing what is not one      (no torch)
writer.py    reproducible tars, members table, index                (no torch)
packaged.py  sets made from installed packages                      (no torch)
remote.py    sets on a server, fetched shard by shard into a cache  (no torch)
order.py     which sample comes at which position of an epoch
samples.py   bytes of one sample, decoded
augment.py   random views of an image, and where they came from
loader.py    batches of this rank, from a position on
targets.py   on the device: normalise, mix, labels of every patch
"""
