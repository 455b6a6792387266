"""Images decode to the pixels that torchvision gives, within one limit for all formats; EXIF turns them where asked."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from refiner_ds.config import load
from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.samples import RawSample
from refiner_ds.errors import ConfigError, DataError

FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM"]


def raw(data: bytes) -> RawSample:
    return RawSample(memoryview(data), memoryview(b""), 0, "0.jpg", "shard-000000.tar", 0)


def stored(image: Image.Image, form: str, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return buffer.getvalue()


def corners() -> Image.Image:
    """Black at the top left, red at the top right, green at the bottom left; wider than high."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, 16:, 0] = pixels[8:, :16, 1] = 250
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored_as_torchvision_does_unless_the_run_file_says_otherwise(
    form: str, orientation: int
) -> None:
    data = stored(corners(), form, orientation)
    as_stored, turned = decode_image(raw(data)), decode_image(raw(data), DecodeKeys(exif_orientation=True))
    image = Image.open(io.BytesIO(data))
    assert np.abs(as_stored.astype(int) - np.asarray(image.convert("RGB"))).max() <= 3
    wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # type: ignore[union-attr]
    assert turned.shape == wanted.shape and np.abs(turned.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_orientations_that_mean_nothing_turn_nothing(orientation: int) -> None:
    data = stored(corners(), "PNG", orientation)
    assert (decode_image(raw(data), DecodeKeys(exif_orientation=True)) == np.asarray(corners())).all()


def test_damaged_exif_turns_nothing() -> None:
    data = stored(corners(), "JPEG", 6).replace(b"Exif\0\0II", b"Exif\0\0??").replace(b"Exif\0\0MM", b"Exif\0\0??")
    assert decode_image(raw(data), DecodeKeys(exif_orientation=True)).shape == (16, 32, 3)


@pytest.mark.parametrize("form", FORMATS)
def test_one_limit_holds_for_every_format(form: str) -> None:
    data = stored(Image.new("RGB", (40, 50), (200, 0, 0)), form)
    assert decode_image(raw(data), DecodeKeys(max_megapixels=0.002)).shape == (50, 40, 3)
    with pytest.raises(DataError, match=r"sample 0 \(0.jpg\): has 40×50 pixels, more than refiner.data.max_megapixels"):
        decode_image(raw(data), DecodeKeys(max_megapixels=0.0019))


def test_the_limit_is_the_run_files_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would warn at 100 pixels and refuse at 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in FORMATS:
            assert decode_image(raw(stored(Image.new("RGB", (40, 50)), form))).shape == (50, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert int(DecodeKeys().max_megapixels * 1e6) == 2 * 89478485  # where Pillow refuses by itself


def test_whatever_a_decoder_raises_is_one_sentence_that_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    avif = stored(Image.new("RGB", (40, 50)), "AVIF").replace(b"av01", b"xx01")
    for data, says in ((avif, "Failed to decode"), (b"<html>404</html>", "cannot identify image file")):
        with pytest.raises(DataError, match=f"the image cannot be decoded .{says}") as told:
            decode_image(raw(data))
        assert "0x" not in str(told.value)
    for kind in (RuntimeError, KeyError, IndexError, EOFError, Image.DecompressionBombError):

        def broken(file: object, kind: type[Exception] = kind) -> None:
            raise kind(f"broken\n{file}")

        monkeypatch.setattr(Image, "open", broken)
        with pytest.raises(DataError, match="the image cannot be decoded .*broken") as told:
            decode_image(raw(b"anything"))
        assert "\n" not in str(told.value) and "0x" not in str(told.value)


def test_large_images_are_damaged_samples_of_a_run(make_set: Callable[..., ShardIndex]) -> None:
    index, keys = make_set(4), DecodeKeys(max_megapixels=63e-6)
    how = {"batch": 4, "rank": 0, "world_size": 1, "decode": keys}
    with pytest.raises(DataError, match="has 8×8 pixels"):
        list(eval_batches(index, EvalSettings(8, 1.0), **how))  # type: ignore[arg-type]
    (batch,) = eval_batches(index, EvalSettings(8, 1.0), on_bad_sample="skip", **how)  # type: ignore[arg-type]
    assert batch.bad == 4


def test_keys_that_do_not_go_together_are_refused() -> None:
    maps = ["refiner.data.score_maps=true", "refiner.data.exif_orientation=true"]
    with pytest.raises(ConfigError, match="exif_orientation .* must be false where score_maps is true"):
        load(overrides=maps)
    with pytest.raises(ConfigError, match="maps .* must be null where score_maps is false"):
        load(overrides=["refiner.data.maps=/elsewhere"])
