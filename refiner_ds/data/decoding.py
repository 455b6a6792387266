"""From the bytes of an image file to pixels.

JPEG files go through libjpeg-turbo (simplejpeg); everything else, and what it cannot read, goes through Pillow. Where
only a crop is wanted and `crop_decoding` can be used, only the crop of a JPEG is decoded, to the same pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.crop_decoding import LARGEST_SHARE, crop_decoder, decode_crop
from refiner_ds.data.samples import RawSample
from refiner_ds.errors import DataError

JPEG_START = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # EXIF's tag
OBJECT = re.compile(r"\s*<[^<>]* at 0x[0-9a-f]+>")
AS_STORED = DecodeKeys()

# EXIF's orientations: whether rows and columns change places, and then which axes of [y, x] are reversed.
TURNS = {
    2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)),
    5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1)), 8: (True, (0,)),
}  # fmt: skip


def decode_image(raw: RawSample, keys: DecodeKeys = AS_STORED) -> np.ndarray:
    """Pixels of a sample, [height, width, 3] uint8 RGB; grey is repeated, CMYK and transparency are flattened.

    Args:
        keys: the run file's limit on megapixels, and whether to turn images as their EXIF orientation says.
    Raises:
        DataError: the bytes are no image that can be decoded, or one that is too large.
    """
    image_yx3 = _decode_jpeg(raw, keys) if raw.image[:3] == JPEG_START else None
    if image_yx3 is None:
        image_yx3 = _decode_with_pillow(raw, keys)
    return _turned(image_yx3, raw) if keys.exif_orientation else image_yx3


class Picture(Protocol):
    """What a crop can be cut from: pixels, or a file that is decoded when it is known which crop is wanted."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, 3."""

    def __getitem__(self, crop: tuple[slice, slice]) -> np.ndarray:
        """The pixels of [rows, columns], [height, width, 3] uint8; good until the next crop of any picture."""


class JpegFile:
    """A JPEG file of which only the crop that is asked for is decoded.

    Args:
        shape: height, width and 3.
    """

    def __init__(self, raw: RawSample, keys: DecodeKeys, shape: tuple[int, ...]) -> None:
        self._raw, self._keys, self.shape = raw, keys, shape

    def __getitem__(self, crop: tuple[slice, slice]) -> np.ndarray:
        """The pixels of [rows, columns]; DataError where the file cannot be decoded."""
        (top, bottom), (left, right) = (part.indices(size)[:2] for part, size in zip(crop, self.shape, strict=False))
        height, width = bottom - top, right - left
        pixels_yx3 = None
        if height * width <= LARGEST_SHARE * self.shape[0] * self.shape[1]:
            pixels_yx3 = decode_crop(self._raw.image, left, top, width, height)
        return decode_image(self._raw, self._keys)[crop] if pixels_yx3 is None else pixels_yx3


def open_picture(raw: RawSample, keys: DecodeKeys = AS_STORED) -> Picture:
    """An image to take a crop from; arguments and errors as `decode_image`'s, which may also come with the crop."""
    if raw.image[:3] == JPEG_START and crop_decoder() is not None and not keys.exif_orientation:
        with suppress(ValueError):
            height, width, _, _ = simplejpeg.decode_jpeg_header(raw.image)
            _refuse_too_large(raw, int(height), int(width), keys)
            return JpegFile(raw, keys, (int(height), int(width), 3))
    return decode_image(raw, keys)


def _decode_jpeg(raw: RawSample, keys: DecodeKeys) -> np.ndarray | None:
    """Pixels; None for CMYK, and for files with recoverable faults: Pillow decides."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(raw.image)
        _refuse_too_large(raw, int(height), int(width), keys)
        return np.asarray(simplejpeg.decode_jpeg(raw.image, "RGB"))
    except ValueError:
        return None


def _decode_with_pillow(raw: RawSample, keys: DecodeKeys) -> np.ndarray:
    try:
        with pillow_without_limit(), Image.open(io.BytesIO(raw.image)) as image:
            _refuse_too_large(raw, image.height, image.width, keys)
            if image.mode.startswith("I"):  # 16 bits of grey: Pillow would cut off what is above 255, most of it white
                grey_yx = np.rint(np.array(image) / 257).clip(0, 255).astype(np.uint8)
                return np.repeat(grey_yx[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))  # a copy: torch warns about memory it must not write to
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their formats' readers raise
        raise DataError(f"{raw.location}: the image cannot be decoded ({what_pillow_says(error)})") from None


def what_pillow_says(error: Exception) -> str:
    """Pillow's words on one line, without addresses of objects in memory: the same file, the same words."""
    said = OBJECT.sub("", str(error)) or type(error).__name__
    return " ".join(said.split())


@contextmanager
def pillow_without_limit() -> Iterator[None]:
    """Let Pillow open images of any size: one limit holds for every format, and it is not Pillow's."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _refuse_too_large(raw: RawSample, height: int, width: int, keys: DecodeKeys) -> None:
    if height * width > keys.max_megapixels * 1e6:
        raise DataError(
            f"{raw.location}: has {width}×{height} pixels, more than refiner.data.max_megapixels"
            f" {keys.max_megapixels:g}; leave the image out, or raise the limit"
        )


def _turned(image_yx3: np.ndarray, raw: RawSample) -> np.ndarray:
    """An image as its EXIF orientation says."""
    try:
        with pillow_without_limit(), Image.open(io.BytesIO(raw.image)) as image:
            if image.format == "TIFF":
                return image_yx3  # Pillow has turned it already
            orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises a dozen kinds at EXIF blocks that are damaged; the pixels do not need them
        return image_yx3
    swapped, reversed_axes = TURNS.get(orientation, (False, ()))
    image_yx3 = image_yx3.swapaxes(0, 1) if swapped else image_yx3
    return np.ascontiguousarray(np.flip(image_yx3, reversed_axes))
