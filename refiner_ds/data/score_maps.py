"""Score maps: an annotator network's top-k classes at every location of an image.

A record, the payload of a ``.map`` member:

    "RMAP"  version u8  k u8  rows u16  columns u16  label i32       14 bytes, little endian
    zstd of: values  [k, h, w] as 16-bit words: the first plane's fp16 bits, then each plane's minus the plane's before
             classes [k, h, w] int16

Values fall from plane to plane, so differences of their bits are small and compress well; arithmetic is modulo 2**16
and therefore exact for any bits. Axes: K top-k, h×w the map's grid.

Published maps (token labelling; Jiang et al., 2021) are torch files of one float16 tensor [2, 5, h, w]: values, class
numbers. Nothing here needs torch but reading those.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from refiner_ds.data.index import MapFormat
from refiner_ds.errors import DataError

HEADER = struct.Struct("<4sBBHHi")
MAGIC = b"RMAP"
VERSION = 1
LEVEL = 9
MAX_CLASSES = 1 << 15  # int16
MAX_TOP_K = 255  # u8
EXACT_IN_FP16 = 2048  # class numbers of published maps are float16

_compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
_decompressor = zstandard.ZstdDecompressor()


@dataclass(frozen=True)
class ScoreMap:
    """Top-k class logits at each location of an image.

    Attributes:
        values_Khw: [K, h, w] float16 logits, falling along K.
        classes_Khw: [K, h, w] int16 class numbers.
        label: of the image.
    """

    values_Khw: np.ndarray
    classes_Khw: np.ndarray
    label: int

    @property
    def format(self) -> MapFormat:
        """k and grid."""
        return MapFormat(*self.values_Khw.shape)


def encode(score_map: ScoreMap) -> bytes:
    """A score map as a record."""
    bits = np.ascontiguousarray(score_map.values_Khw, dtype="<f2").view("<u2")
    deltas = np.concatenate([bits[:1], bits[1:] - bits[:-1]])
    body = deltas.tobytes() + score_map.classes_Khw.astype("<i2").tobytes()
    return HEADER.pack(MAGIC, VERSION, *bits.shape, score_map.label) + _compressor.compress(body)


def decode(record: bytes | memoryview, location: str) -> ScoreMap:
    """Read a record.

    Args:
        record: a ``.map`` member's payload.
        location: shard and sample, for error messages.
    Raises:
        DataError: the bytes are not a record of this version, or are damaged.
    """
    try:
        magic, version, k, rows, columns, label = HEADER.unpack_from(record)
        if magic != MAGIC or version != VERSION:
            raise DataError(f"{location}: not a version {VERSION} score map; annotate or shard the set again")
        packed = record[HEADER.size :]
        if zstandard.frame_content_size(packed) != 4 * k * rows * columns:  # a few bytes may hold gigabytes
            raise ValueError(f"it does not hold {k}×{rows}×{columns} scores")
        body = _decompressor.decompress(packed)
        words = np.frombuffer(body, "<u2").reshape(2, k, rows, columns)
    except (struct.error, zstandard.ZstdError, ValueError) as error:
        raise DataError(f"{location}: its score map is damaged ({error})") from None
    values = np.add.accumulate(words[0], axis=0, dtype="<u2").view("<f2")
    return ScoreMap(values, words[1].view("<i2"), label)


def read_published(path: Path, label: int, classes: int) -> ScoreMap:
    """Read one published map; nothing in the file is executed.

    Args:
        path: a ``.pt`` file.
        label: of its image.
        classes: number of classes; class numbers must lie below.
    Raises:
        DataError: not such a file, or the numbers in it cannot be scores and classes.
    """
    import torch  # here alone: sharding without published maps needs none

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; every image of a set needs its map") from None
    except Exception as error:  # torch reports damaged and refused files by a dozen exception types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a published score map ({first_line})") from None
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or len(tensor) != 2:
        raise DataError(f"{path}: not a published score map; wanted one tensor [2, k, h, w]")
    values, numbers = tensor.numpy()
    if values.shape[0] > MAX_TOP_K:
        raise DataError(f"{path}: {values.shape[0]} classes a location; a record holds at most {MAX_TOP_K}")
    if not (np.isfinite(values).all() and (numbers == np.round(numbers)).all()):
        raise DataError(f"{path}: scores must be finite and class numbers whole")
    if numbers.min() < 0 or numbers.max() >= min(classes, MAX_CLASSES):
        raise DataError(f"{path}: class number {numbers.max():.0f}, but there are {classes} classes")
    if numbers.dtype == np.float16 and classes > EXACT_IN_FP16:
        raise DataError(f"{path}: float16 holds class numbers up to {EXACT_IN_FP16} exactly; not {classes}")
    return ScoreMap(values.astype(np.float16), numbers.astype(np.int16), label)
