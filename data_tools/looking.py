"""A quick look at an image file's bytes: its true kind, and what is wrong or unusual about it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import simplejpeg
from PIL import Image

JPEG_END = b"\xff\xd9"
UNUSUAL_COLOURS = ("Gray", "CMYK", "YCCK")


@dataclass(frozen=True)
class Look:
    """What a look found.

    Attributes:
        ending: "jpg", "png" or another of `ENDINGS`, from the bytes and not from the file's name.
        note: what is unusual though readable, or "".
        fault: why the file cannot be used, or "".
    """

    ending: str
    note: str = ""
    fault: str = ""


ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}  # Pillow's names


def look_at(data: bytes, name: str, decode: bool = False) -> Look:
    """Judge an image file by its bytes.

    Args:
        data: the whole file.
        name: its name, to tell when the ending lies.
        decode: decode the pixels whatever the first look says.
    """
    if data[:3] == b"\xff\xd8\xff":
        look = _look_at_jpeg(data, decode)
    else:
        look = _look_with_pillow(data)
    promised = name.rpartition(".")[2].lower().replace("jpeg", "jpg")
    if not look.fault and promised != look.ending:
        return Look(look.ending, f"named .{promised}, is a {look.ending}" + (f", {look.note}" if look.note else ""))
    return look


def _look_at_jpeg(data: bytes, decode: bool) -> Look:
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return Look("jpg", fault=f"its header cannot be read ({error})")
    note = f"{colours} colours" if colours in UNUSUAL_COLOURS else ""
    if decode or data.rfind(JPEG_END, len(data) // 2) < 0:  # a thumbnail's end may come early, the picture's cannot
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
        except ValueError as error:  # Pillow forgives more, and what it forgives can be trained on
            forgiven = f"damaged, though it decodes ({error})"
            return Look("jpg", f"{note}, {forgiven}" if note else forgiven, _look_with_pillow(data).fault)
    return Look("jpg", note)


def _look_with_pillow(data: bytes) -> Look:
    if not data:
        return Look("", fault="empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            image.load()
            grey = image.mode in ("L", "LA", "1", "I", "I;16")
    except Exception as error:  # Pillow's decoders raise whatever their formats' readers raise
        return Look("", fault=f"cannot be decoded ({error or type(error).__name__})")
    if kind not in ENDINGS:
        return Look("", fault=f"is {kind}, not one of {', '.join(ENDINGS.values())}")
    return Look(ENDINGS[kind], "Gray colours" if grey else "")
