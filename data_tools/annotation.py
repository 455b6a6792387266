"""Computes score maps in chunks of a few batches: what processes share out, and what a killed run keeps.

<set>.partial/
  shard-000000.tar.chunk-0000064    maps of the chunk that begins with sample 64 of the set: u32 length, record, …

Chunks are the same for any number of processes, so that batches, and with them the last bits of the scores, are too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from refiner_ds.data.augment import resize
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import MapFormat, ShardIndex
from refiner_ds.data.normalize import normalize
from refiner_ds.data.samples import RawSample, SampleReader
from refiner_ds.data.score_maps import MAX_CLASSES, ScoreMap, encode
from refiner_ds.data.writer import write_whole
from refiner_ds.errors import DataError

from .annotation_settings import Settings
from .annotators import Annotator, load_annotator

CHUNK_BATCHES = 4
MAX_FP16 = 65504.0
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Chunk:
    """Samples of one shard, ``first`` up to but not including ``end``, and the file for their maps."""

    shard: int
    first: int
    end: int
    path: Path

    def records(self) -> Iterator[bytes]:
        """The map records in the file, in order."""
        data = self.path.read_bytes()
        place = 0
        while place < len(data):
            (length,) = LENGTH.unpack_from(data, place)
            yield data[place + LENGTH.size : place + LENGTH.size + length]
            place += LENGTH.size + length


def chunks_of(index: ShardIndex, shard: int, batch: int, partial: Path) -> list[Chunk]:
    """A shard in chunks of whole batches."""
    first, end = index.starts[shard : shard + 2].tolist()
    size = batch * CHUNK_BATCHES
    return [
        Chunk(shard, start, min(end, start + size), partial / f"{index.shards[shard].name}.chunk-{start:07d}")
        for start in range(first, end, size)
    ]


class Worker:
    """One process's annotator, on its device, and the set it annotates."""

    def __init__(self, settings: Settings, index: ShardIndex, number: int) -> None:
        torch.set_num_threads(1)  # processes are the parallelism, and one thread gives the same bits everywhere
        torch.backends.cudnn.benchmark = False
        device = settings.device
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        self.settings = settings
        self.index = index
        self.device = torch.device(device)
        self.reader = SampleReader(index)
        self.annotator: Annotator = load_annotator(settings.model, settings.checkpoint, len(index.classes))
        self.annotator.network.to(self.device)

    @torch.inference_mode()
    def annotate_images(self, images_BHWC: np.ndarray, labels: list[int]) -> list[ScoreMap]:
        """Score maps of images [B, S, S, 3] uint8."""
        images = torch.from_numpy(images_BHWC).to(self.device)
        images_B3HW = normalize(images, self.annotator.mean, self.annotator.std, torch.float32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            logits_BChw = self.annotator.network(images_B3HW)
        top = min(self.settings.top, logits_BChw.shape[1])
        values, classes = logits_BChw.float().topk(top, dim=1)
        values_BKhw = values.clamp(-MAX_FP16, MAX_FP16).half().cpu().numpy()
        classes_BKhw = classes.to(torch.int16).cpu().numpy()
        return list(map(ScoreMap, values_BKhw, classes_BKhw, labels))

    def map_format(self) -> MapFormat:
        """The format of every map.

        Raises:
            DataError: the network predicts another number of classes than the set has, or more than a record can hold.
        """
        side, classes = self.settings.size, len(self.index.classes)
        with torch.inference_mode():
            found = self.annotator.network(torch.zeros(1, 3, side, side, device=self.device)).shape[1]
        if found != classes:
            raise DataError(
                f"--model {self.settings.model}: predicts {found} classes where the set has {classes}; "
                "choose a model trained on the set's own classes"
            )
        if classes > MAX_CLASSES:
            raise DataError(f"{self.index.folder}: {classes} classes; a score map can name {MAX_CLASSES}")
        return self.annotate_images(np.zeros((1, side, side, 3), np.uint8), [0])[0].format

    def annotate_chunk(self, chunk: Chunk) -> Chunk:
        """Write the maps of a chunk, unless an earlier run has."""
        if chunk.path.exists():
            return chunk
        records = []
        for first in range(chunk.first, chunk.end, self.settings.batch):
            samples = range(first, min(chunk.end, first + self.settings.batch))
            raws = [self.reader.read(sample) for sample in samples]
            assert all(raw.key for raw in raws)  # one that cannot be written is refused before its maps are made
            for score_map in self._annotate_samples(raws):
                record = encode(score_map)
                records += [LENGTH.pack(len(record)), record]
        write_whole(chunk.path, b"".join(records))
        return chunk

    def _annotate_samples(self, raws: list[RawSample]) -> list[ScoreMap]:
        side = self.settings.size
        images = np.stack([resize(decode_image(raw, self.settings.decode), side, side, "bicubic") for raw in raws])
        return self.annotate_images(images, [raw.label for raw in raws])
