"""Decoding a crop alone gives the pixels of decoding the whole image, bit by bit; else the whole is decoded."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data import crop_decoding, decoding
from refiner_ds.data.decoding import JpegFile, decode_image, open_picture
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.data.samples import RawSample
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from tests.data.conftest import views

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension as an installation builds it; skips where there is no compiler or no libjpeg-turbo."""
    place = tmp_path_factory.mktemp("built")
    build = ("setup.py", "-q", "build_ext", "--build-lib", str(place), "--build-temp", str(place / "temporary"))
    done = subprocess.run([sys.executable, *build], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = list(place.glob("refiner_ds/data/_jpeg_crop*.so"))
    if not found:
        pytest.skip("no compiler or no headers of libjpeg-turbo, so the extension is not built here")
    spec = importlib.util.spec_from_file_location("_jpeg_crop", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def decoder(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension, in use."""
    for module in (crop_decoding, decoding):
        monkeypatch.setattr(module, "crop_decoder", lambda: built)
    return built


def photograph(number: int, height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def files(number: int, height: int, width: int) -> list[bytes]:
    """One picture in every kind of JPEG: subsamplings, grey, progressive, restart markers."""
    image = photograph(number, height, width)
    pixels = np.ascontiguousarray(np.asarray(image))
    return [
        *(jpeg(image, subsampling=kind) for kind in (0, 1, 2)),
        *(simplejpeg.encode_jpeg(pixels, 80, "RGB", kind) for kind in ("440", "411")),
        jpeg(image.convert("L")),
        jpeg(image, progressive=True),
        jpeg(image, restart_marker_rows=1, quality=40),
        jpeg(image, keep_rgb=True, subsampling=0),
    ]


def raw(data: bytes) -> RawSample:
    return RawSample(memoryview(data), memoryview(b""), 0, "0.jpg", "shard-000000.tar", 0)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (97, 641), (33, 17), (8, 8), (1, 1), (257, 3)])
def test_crops_are_those_of_the_whole_image_bit_by_bit(decoder: ModuleType, shape: tuple[int, int]) -> None:
    numbers = random.Random(0)
    height, width = shape
    for data in files(1, height, width):
        whole_yx3 = simplejpeg.decode_jpeg(data, "RGB")
        for _ in range(12):
            crop_height, crop_width = numbers.randint(1, height), numbers.randint(1, width)
            y, x = numbers.randint(0, height - crop_height), numbers.randint(0, width - crop_width)
            crop_yx3 = np.empty((crop_height, crop_width, 3), np.uint8)
            assert decoder.decode_crop(data, x, y, crop_width, crop_height, crop_yx3)
            assert (crop_yx3 == whole_yx3[y : y + crop_height, x : x + crop_width]).all()


def test_training_batches_do_not_depend_on_it(
    decoder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [data for number in range(3) for data in files(number, 120 + 40 * number, 200)]
    with SetWriter(tmp_path / "set", ["a"], 10) as writer:
        for number, data in enumerate([*kinds, jpeg(photograph(9, 90, 60).convert("CMYK"))]):
            writer.add(f"{number}", data, "jpg", 0)
    index = ShardIndex.load(tmp_path / "set")
    calls: list[int] = []

    def counted(*arguments: Any) -> bool:
        calls.append(1)
        return bool(decoder.decode_crop(*arguments))

    def images(workers: int) -> list[torch.Tensor]:
        batches = train_batches(
            index, views(64), global_batch=7, micro_batch=7, rank=0, world_size=1, seed=0, workers=workers
        )
        return [batch.images_BHWC for batch in islice(batches, 8)]

    crops = [images(1), images(0)]
    for module in (crop_decoding, decoding):
        monkeypatch.setattr(module, "crop_decoder", lambda: SimpleNamespace(decode_crop=counted))
    crops.append(images(0))
    assert len(calls) > 30
    for module in (crop_decoding, decoding):
        monkeypatch.setattr(module, "crop_decoder", lambda: None)
    whole = images(0)
    for ours in crops:
        assert all(torch.equal(one, other) for one, other in zip(ours, whole, strict=True))


def test_files_that_are_damaged_or_no_jpeg_are_left_to_whole_decoding(decoder: ModuleType) -> None:
    data = jpeg(photograph(2, 300, 300))
    crop_yx3 = np.empty((50, 60, 3), np.uint8)
    numbers = random.Random(1)
    assert not decoder.decode_crop(b"", 0, 0, 60, 50, crop_yx3)
    assert not decoder.decode_crop(b"GIF89a", 0, 0, 60, 50, crop_yx3)
    assert not decoder.decode_crop(data[: len(data) // 2], 200, 240, 60, 50, crop_yx3)
    assert not decoder.decode_crop(data, 250, 0, 60, 50, crop_yx3)  # past the right edge
    assert not decoder.decode_crop(jpeg(photograph(3, 90, 90).convert("CMYK")), 0, 0, 60, 50, crop_yx3)
    for _ in range(300):  # any bytes at all: an answer, and nothing written outside
        broken = bytearray(data[: numbers.randint(2, len(data))])
        for _ in range(numbers.randint(1, 20)):
            broken[numbers.randrange(len(broken))] = numbers.randrange(256)
        assert decoder.decode_crop(bytes(broken), 100, 150, 60, 50, crop_yx3) in (True, False)


def test_room_that_is_too_small_is_refused(decoder: ModuleType) -> None:
    data = jpeg(photograph(4, 100, 100))
    for shape, width in (((50, 60, 3), 61), ((50, 60, 3), 59), ((0, 60, 3), 60)):
        with pytest.raises(ValueError, match="out must have width"):
            decoder.decode_crop(data, 0, 0, width, shape[0], np.empty(shape, np.uint8))
    with pytest.raises(ValueError, match="65500"):
        decoder.decode_crop(data, 1 << 31, 0, 60, 50, np.empty((50, 60, 3), np.uint8))
    with pytest.raises((BufferError, ValueError, TypeError)):
        decoder.decode_crop(data, 0, 0, 60, 50, bytes(9000))


def test_a_picture_is_its_file_until_a_crop_is_wanted(decoder: ModuleType) -> None:
    data = jpeg(photograph(5, 120, 160))
    picture = open_picture(raw(data))
    assert isinstance(picture, JpegFile) and picture.shape == (120, 160, 3)
    whole_yx3 = decode_image(raw(data))
    assert (picture[20:100, 30:90] == whole_yx3[20:100, 30:90]).all() and (picture[:, :] == whole_yx3).all()
    assert not isinstance(open_picture(raw(data), DecodeKeys(exif_orientation=True)), JpegFile)
    with pytest.raises(DataError, match="has 160×120 pixels, more than"):
        open_picture(raw(data), DecodeKeys(max_megapixels=0.01))
    cut = open_picture(raw(data[:3000]))
    with pytest.raises(DataError, match=r"sample 0 \(0.jpg\): the image cannot be decoded"):
        cut[90:120, 100:160]


def test_a_decoder_that_does_not_agree_is_not_used(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(file: bytes, x: int, y: int, width: int, height: int, out: np.ndarray) -> bool:
        done = bool(built.decode_crop(file, x, y, width, height, out))
        out[-1, -1, 0] ^= 1
        return done

    assert crop_decoding._agrees(built)
    assert not crop_decoding._agrees(SimpleNamespace(decode_crop=shifted))  # type: ignore[arg-type]
    assert not crop_decoding._agrees(SimpleNamespace(decode_crop=lambda *_: False))  # type: ignore[arg-type]
    monkeypatch.setenv(crop_decoding.SWITCH, "0")
    assert crop_decoding.crop_decoder.__wrapped__() is None


def test_without_a_compiler_the_package_is_built_all_the_same(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    build = ("setup.py", "-q", "build", "--build-base", str(tmp_path / "base"))
    done = subprocess.run(
        [sys.executable, *build], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("base/lib*/refiner_ds/data/loader.py")) and not list(tmp_path.glob("base/**/*.so"))
