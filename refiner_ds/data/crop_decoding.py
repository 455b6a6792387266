"""JPEG files of which only a crop is decoded, where the extension that does it could be built.

Training crops a quarter to a half of an image's pixels on average; what lies outside is most of the work of decoding.
`_jpeg_crop.c` uses libjpeg-turbo's own API for that (``jpeg_crop_scanline``, ``jpeg_skip_scanlines``), which no package
on the index offers. It is built at installation where a compiler and libjpeg-turbo's headers are found, and never
needed: the pixels are those of decoding the whole image, bit by bit, which is tried before its first use.
"""

from __future__ import annotations

import os
import random
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import simplejpeg

LARGEST_SHARE = 0.9  # of an image's pixels: beyond it, decoding all of them takes no longer
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
SWITCH = "REFINER_DS_CROP_DECODING"  # set to 0, it keeps the extension out of use

_memory_n = np.empty(0, np.uint8)  # [n] bytes of the last crop


@cache
def crop_decoder() -> ModuleType | None:
    """The extension; None where it is not built, switched off, or not equal to decoding whole images."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        decoder = import_module("refiner_ds.data._jpeg_crop")
    except ImportError:  # not built, or built against a libjpeg that this machine has not
        return None
    return decoder if _agrees(decoder) else None


def decode_crop(file: memoryview, x: int, y: int, width: int, height: int) -> np.ndarray | None:
    """A crop of a JPEG file, [height, width, 3] uint8 RGB; None where the whole image has to be decoded.

    The pixels are good until the next call, whose crop takes their memory: fresh pages for every crop cost a tenth of
    the decoding.
    """
    global _memory_n
    decoder = crop_decoder()
    if decoder is None:
        return None
    size = height * width * 3
    if size > len(_memory_n):
        _memory_n = np.empty(size, np.uint8)
    pixels_yx3 = _memory_n[:size].reshape(height, width, 3)
    return pixels_yx3 if decoder.decode_crop(file, x, y, width, height, pixels_yx3) else None


def _agrees(decoder: ModuleType) -> bool:
    """Whether crops equal those of whole images, for every subsampling: two builds of one library need not agree."""
    numbers = random.Random(0)
    noise_yx3 = np.frombuffer(numbers.randbytes(150 * 170 * 3), np.uint8).reshape(150, 170, 3)
    for subsampling in SUBSAMPLINGS:
        if subsampling == "Gray":
            file = simplejpeg.encode_jpeg(np.ascontiguousarray(noise_yx3[..., :1]), 90, "Gray", "Gray")
        else:
            file = simplejpeg.encode_jpeg(noise_yx3, 90, "RGB", subsampling)
        whole_yx3 = simplejpeg.decode_jpeg(file, "RGB")
        for x, y, width, height in ((0, 0, 61, 47), (71, 53, 67, 59), (103, 97, 67, 53), (35, 40, 1, 1)):
            crop_yx3 = np.empty((height, width, 3), np.uint8)
            wanted_yx3 = whole_yx3[y : y + height, x : x + width]
            if not decoder.decode_crop(file, x, y, width, height, crop_yx3) or (crop_yx3 != wanted_yx3).any():
                return False
    return True
