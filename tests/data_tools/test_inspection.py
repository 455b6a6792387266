"""What is said of an image file follows from its bytes: its format, what is unusual, and why it is left out."""

from __future__ import annotations

import io
import zlib

import pytest
from PIL import Image

from data_tools.inspection import Inspection, inspect_image
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.samples import RawSample
from tests.data_tools.conftest import picture

LIMIT = 1_000_000


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (24, 18), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def inspect(data: bytes, name: str, decode: bool = False) -> Inspection:
    return inspect_image(data, name, decode, LIMIT)


@pytest.mark.parametrize(
    "kind, names, extension",
    [
        ("JPEG", "a.jpg a.JPEG a.jpe a.jfif", "jpg"),
        ("PNG", "a.png a.PNG", "png"),
        ("WEBP", "a.webp", "webp"),
        ("AVIF", "a.avif", "avif"),
        ("BMP", "a.bmp", "bmp"),
        ("GIF", "a.gif", "gif"),
        ("TIFF", "a.tif a.TIFF", "tif"),
        ("PPM", "a.ppm a.pnm", "ppm"),
        ("MPO", "a.jpg", "jpg"),
    ],
)
def test_every_format_is_known_by_its_bytes_and_can_be_trained_on(kind: str, names: str, extension: str) -> None:
    data = saved(kind)
    for name in names.split():
        assert inspect(data, name) == inspect(data, name, decode=True) == Inspection(extension)
    assert "is a " + extension in inspect(data, "a.xyz").note
    assert decode_image(RawSample(memoryview(data), memoryview(b""), 0, "", "", 0)).shape == (18, 24, 3)


def test_other_formats_are_named() -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    assert inspect(heic, "a.jpg").error == "is HEIC, which is not taken; convert it to JPEG or PNG"
    assert inspect(saved("ICO", size=(16, 16)), "a.png").error.startswith("is ICO, not one of avif, bmp")
    assert "floating-point" in inspect(saved("TIFF", "F"), "a.tif").error


def test_what_is_said_of_a_broken_file_is_the_same_each_time() -> None:
    """No address of an object in memory."""
    for data in (b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(30), picture(1)[:200], b"GIF89a", b""):
        first = inspect(data, "a.png")
        kept = [io.BytesIO() for _ in range(3)]  # so that the next object lies elsewhere
        assert first == inspect(data, "a.png") and first.error and "0x" not in first.error, len(kept)
    assert inspect(b"<html>404</html>", "a.jpg").error == "not an image in a format that is known"


def test_addresses_of_objects_are_left_out_of_what_a_decoder_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: object) -> None:
        raise OSError(f"broken file {file}")

    monkeypatch.setattr(Image, "open", broken)
    assert inspect(b"anything", "a.png").error == "cannot be decoded (broken file)"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_orientation_is_noted(kind: str) -> None:
    """Not of TIFF, which Pillow turns as it reads."""
    name = f"a.{kind.lower()}"
    assert inspect(saved(kind, exif=turned(6)), name).note == "EXIF orientation 6"
    assert inspect(saved(kind, exif=turned(1)), name).note == ""


def test_several_frames_are_noted() -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert "2 frames, of which the first is used" in inspect(buffer.getvalue(), "a.gif").note


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"])
def test_one_limit_of_pixels_holds_for_every_format(kind: str) -> None:
    data = saved(kind, "RGB", (1001, 1000))
    assert inspect(data, f"a.{kind.lower()}").error == "1001×1000 pixels, more than 1 megapixels"
    assert not inspect(saved(kind, "RGB", (1000, 1000)), f"a.{kind.lower()}").error


def test_bomb_is_not_decoded_to_be_found() -> None:
    """A PNG of 40 gigapixels, of which there is only the header."""
    header = (200_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert inspect(data, "a.png").error == "200000×200000 pixels, more than 1 megapixels"
