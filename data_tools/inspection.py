"""A quick inspection of an image file's bytes: its true format, and what is wrong or unusual about it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import simplejpeg
from PIL import Image

JPEG_END = b"\xff\xd9"
UNUSUAL_COLOURS = ("Gray", "CMYK", "YCCK")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}  # by Pillow's format names


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


def inspect_image(data: bytes, name: str, decode: bool = False) -> Inspection:
    """Inspect an image file by its bytes.

    Args:
        data: the whole file.
        name: its name, to tell when the extension is wrong.
        decode: decode the pixels even if the quick inspection finds nothing.
    """
    if data[:3] == b"\xff\xd8\xff":
        found = _inspect_jpeg(data, decode)
    else:
        found = _inspect_with_pillow(data)
    named = name.rpartition(".")[2].lower().replace("jpeg", "jpg")
    if not found.error and named != found.extension:
        mismatch = f"named .{named}, is a {found.extension}"
        return Inspection(found.extension, f"{mismatch}, {found.note}" if found.note else mismatch)
    return found


def _inspect_jpeg(data: bytes, decode: bool) -> Inspection:
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return Inspection("jpg", error=f"its header cannot be read ({error})")
    note = f"{colours} colours" if colours in UNUSUAL_COLOURS else ""
    if decode or data.rfind(JPEG_END, len(data) // 2) < 0:  # a thumbnail may end early, the picture itself cannot
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
        except ValueError as error:  # Pillow tolerates more, and what it tolerates can be trained on
            damaged = f"damaged, though it decodes ({error})"
            return Inspection("jpg", f"{note}, {damaged}" if note else damaged, _inspect_with_pillow(data).error)
    return Inspection("jpg", note)


def _inspect_with_pillow(data: bytes) -> Inspection:
    if not data:
        return Inspection("", error="empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            image.load()
            grey = image.mode in ("L", "LA", "1", "I", "I;16")
    except Exception as error:  # Pillow's decoders raise whatever their formats' readers raise
        return Inspection("", error=f"cannot be decoded ({error or type(error).__name__})")
    if kind not in EXTENSIONS:
        return Inspection("", error=f"is {kind}, not one of {', '.join(EXTENSIONS.values())}")
    return Inspection(EXTENSIONS[kind], "Gray colours" if grey else "")
