"""Shard sets made from data that comes inside installed packages: ``package:digits/train`` and ``package:digits/val``.

    <cache>/digits-v1/train/   made on first use, by the same writer as data_tools/shard.py; renamed into place, so any
    <cache>/digits-v1/val/     number of processes may ask for it at once

Digits: scikit-learn's 1,797 scans of handwritten digits (Alpaydin and Kaynak, 1998), 8×8 pixels in 17 grey levels, here
28×28 PNG files. Every fifth image of each class is held out. Nothing here needs torch.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from refiner_ds.data.index import INDEX_NAME
from refiner_ds.data.writer import SetWriter, cannot_write
from refiner_ds.errors import DataError

PREFIX = "package:"
SETS = ("digits/train", "digits/val")
VERSION = "v1"
DIGIT_SIDE = 28
PER_SHARD = 256  # small on purpose: several shards, as a real set has


def packaged_set(spec: str, cache: Path) -> Path:
    """The folder of a packaged set, made in the cache if it is not there yet.

    Args:
        spec: ``package:<name>/<part>``.
        cache: folder that holds sets made or fetched.
    Raises:
        DataError: no such set, the package is not installed, or the cache cannot be written.
    """
    name = spec.removeprefix(PREFIX)
    if name not in SETS:
        raise DataError(f"{spec}: no such packaged set; there are {', '.join(PREFIX + known for known in SETS)}")
    package, part = name.split("/")
    folder = cache / f"{package}-{VERSION}" / part
    if not (folder / INDEX_NAME).is_file():
        _make(folder, part)
    return folder


def _make(folder: Path, part: str) -> None:
    """Write the set beside its place and move it there, unless another process was first."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{part}-", dir=folder.parent))
    except OSError as error:
        raise DataError(cannot_write(folder, error)) from None
    try:
        made = staging / part
        with SetWriter(made, [str(digit) for digit in range(10)], PER_SHARD) as writer:
            for key, image, label in _digits(part):
                writer.add(key, image, "png", label)
        try:
            os.rename(made, folder)
        except OSError as error:
            if not (folder / INDEX_NAME).is_file():
                raise DataError(cannot_write(folder, error)) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _digits(part: str) -> Iterator[tuple[str, bytes, int]]:
    """Key, PNG bytes and label of the digits of one part, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("package:digits needs scikit-learn; pip install scikit-learn") from None
    digits = load_digits()
    held_out = np.zeros(len(digits.target), bool)
    for label in range(10):
        held_out[np.flatnonzero(digits.target == label)[::5]] = True
    chosen = np.flatnonzero(held_out if part == "val" else ~held_out)
    for number, digit in enumerate(np.random.RandomState(0).permutation(chosen)):
        grey = np.round(digits.images[digit] * (255 / 16)).astype(np.uint8)
        picture = Image.fromarray(grey).resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        yield f"{number:04d}-digit-{digit:04d}", buffer.getvalue(), int(digits.target[digit])
