"""A quick inspection of an image file's bytes: its true format, and what is wrong or unusual about it."""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import dataclass

import simplejpeg
from PIL import Image, UnidentifiedImageError

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.decoding import JPEG_START, ORIENTATION, pillow_without_limit, what_pillow_says

JPEG_END = b"\xff\xd9"
EXIF_MARK, EXIF_WITHIN = b"Exif\0\0", 1 << 16  # JPEG keeps it in its first segments
UNUSUAL_COLOURS = ("Gray", "CMYK", "YCCK")
DECODED_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "L", "LA", "1", "CMYK", "YCbCr", "HSV")
EXTENSIONS = {  # by Pillow's names of the formats
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "BMP": "bmp",
    "DIB": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
SAME_EXTENSION = {
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "tiff": "tif",
    "pgm": "ppm",
    "pbm": "ppm",
    "pnm": "ppm",
    "dib": "bmp",
}
HEIC = re.compile(rb".{4}ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.DOTALL)


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        extension: "jpg", "png" or another of `EXTENSIONS`, from the bytes and not from the file's name.
        note: what is unusual though readable, or "".
        error: why the file cannot be used, or "".
    """

    extension: str
    note: str = ""
    error: str = ""


def add_max_megapixels(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag for the one limit on an image's pixels, `refiner.data.max_megapixels` in a run file."""
    limit = DecodeKeys().max_megapixels
    parser.add_argument("--max-megapixels", type=float, default=limit, help=f"{what} (default {limit:g})")


def inspect_image(data: bytes, name: str, decode: bool, max_pixels: int) -> Inspection:
    """Inspect an image file by its bytes.

    Args:
        data: the whole file.
        name: its name, to tell when the extension is wrong.
        decode: decode the pixels even if the quick inspection finds nothing.
        max_pixels: larger images are an error, whatever their format: a small file may hold pixels without end.
    """
    if data[:3] == JPEG_START:
        found = _inspect_jpeg(data, decode, max_pixels)
    else:
        found = _inspect_with_pillow(data, max_pixels)
    named = name.rpartition(".")[2].lower()
    if found.error or SAME_EXTENSION.get(named, named) == found.extension:
        return found
    mismatch = f"named .{named}, is a {found.extension}"
    return Inspection(found.extension, f"{mismatch}, {found.note}" if found.note else mismatch)


def _inspect_jpeg(data: bytes, decode: bool, max_pixels: int) -> Inspection:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return Inspection("jpg", error=f"its header cannot be read ({error})")
    if width * height > max_pixels:
        return Inspection("jpg", error=_too_large(width, height, max_pixels))
    notes = [f"{colours} colours"] if colours in UNUSUAL_COLOURS else []
    if data.find(EXIF_MARK, 0, EXIF_WITHIN) >= 0:
        notes += _orientation_of_jpeg(data)
    if decode or data.rfind(JPEG_END, len(data) // 2) < 0:  # a thumbnail may end early, the picture itself cannot
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
        except ValueError as error:  # Pillow tolerates more, and what it tolerates can be trained on
            notes.append(f"damaged, though it decodes ({error})")
            return Inspection("jpg", ", ".join(notes), _inspect_with_pillow(data, max_pixels).error)
    return Inspection("jpg", ", ".join(notes))


def _orientation_of_jpeg(data: bytes) -> list[str]:
    try:
        with pillow_without_limit(), Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except Exception:  # Pillow opens less than decodes here
        return []


def _orientation(image: Image.Image) -> list[str]:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever is wrong with the EXIF block, the pixels do not need it
        return ["its EXIF block cannot be read"]
    return [] if orientation in (0, 1) else [f"EXIF orientation {orientation}"]


def _inspect_with_pillow(data: bytes, max_pixels: int) -> Inspection:
    if not data:
        return Inspection("", error="empty")
    if HEIC.match(data):
        return Inspection("", error="is HEIC, which is not taken; convert it to JPEG or PNG")
    try:
        with pillow_without_limit(), Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            if kind not in EXTENSIONS:
                return Inspection("", error=f"is {kind}, not one of {', '.join(sorted(set(EXTENSIONS.values())))}")
            if image.width * image.height > max_pixels:
                return Inspection(EXTENSIONS[kind], error=_too_large(*image.size, max_pixels))
            image.load()
            return _unusual(image, EXTENSIONS[kind])
    except UnidentifiedImageError:
        return Inspection("", error="not an image in a format that is known")
    except Exception as error:  # Pillow's decoders raise whatever their formats' readers raise
        return Inspection("", error=f"cannot be decoded ({what_pillow_says(error)})")


def _unusual(image: Image.Image, extension: str) -> Inspection:
    """What is unusual about an image that Pillow can load."""
    if image.mode == "F":
        return Inspection(extension, error="has floating-point pixels; convert it to 8 bits")
    if image.mode not in DECODED_MODES and not image.mode.startswith("I"):
        image.convert("RGB")  # as decoding will; raises where it cannot
    notes = ["Gray colours"] if image.mode in ("L", "LA", "1") or image.mode.startswith("I") else []
    notes += ["CMYK colours"] if image.mode == "CMYK" else []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"{getattr(image, 'n_frames', 1)} frames, of which the first is used")
    return Inspection(extension, ", ".join(notes + _orientation(image)))


def _too_large(width: int, height: int, max_pixels: int) -> str:
    return f"{width}×{height} pixels, more than {max_pixels / 1e6:g} megapixels"
