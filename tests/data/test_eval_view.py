"""An image is evaluated at the sizes, places and pixels of torchvision's and timm's own transforms, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.loader import PrefetchLoader
from torchvision.transforms.functional import _compute_resized_output_size

from refiner_ds.data import augment
from refiner_ds.data.augment import EvalSettings, eval_view, resized_shape
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.normalize import normalize
from refiner_ds.data.samples import RawSample


@pytest.mark.parametrize("short", [28, 224, 248, 256])
def test_every_shape_is_resized_to_torchvisions_size(short: int) -> None:
    """All million shapes from 1×1 over 1×1000 and 1000×1 to 1000×1000."""
    sides = range(1, 1001)
    wrong = [
        (height, width)
        for height in sides
        for width in sides
        if list(resized_shape(height, width, short)) != _compute_resized_output_size((height, width), [short])
    ]
    assert not wrong


SHAPES = [
    (375, 500),
    (500, 375),
    (333, 500),
    (500, 334),
    (100, 731),
    (731, 99),
    (256, 256),
    (40, 30),
    (17, 1000),
    (3, 7),
]


@pytest.mark.parametrize("crop_ratio", [0.7, 0.875, 0.9, 1.0, 1.13, 1.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_of_every_shape_are_timms(shape: tuple[int, int], crop_ratio: float) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = create_transform(224, crop_pct=crop_ratio, interpolation="bicubic", normalize=False, is_training=False)
    ours_SS3 = eval_view(np.array(picture), EvalSettings(224, crop_ratio))
    assert np.array_equal(ours_SS3, theirs(picture).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("crop_ratio", [0.875, 1.13])
@pytest.mark.parametrize("shape", [(3, 900), (901, 2), (1, 500), (500, 1)])
def test_of_long_thin_images_only_the_middle_is_resized(
    shape: tuple[int, int], crop_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, a PNG of 1×60,000 pixels and 200 bytes would take 12 GB at 256."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    settings = EvalSettings(28, crop_ratio)
    whole_SS3 = eval_view(image, settings)
    monkeypatch.setattr(augment, "MOST_RESIZED", 10_000)
    monkeypatch.setattr(Image.Image, "resize", small_resize)
    assert np.abs(eval_view(image, settings).astype(int) - whole_SS3).max() <= 1


def small_resize(image: Image.Image, size: tuple[int, int], *how: Any, real: Any = Image.Image.resize) -> Image.Image:
    assert max(size) <= 64
    return real(image, size, *how)


def real_jpegs() -> list[Path]:
    """Photographs that come with scikit-learn and matplotlib."""
    found = [*(Path(sklearn.__file__).parent / "datasets/images").glob("*.jpg")]
    found += [*(Path(matplotlib.get_data_path()) / "sample_data").glob("*.jpg")]
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_real_jpegs_are_what_timms_validation_feeds_its_models(crop_mode: str, interpolation: str) -> None:
    """validate.py: Pillow's decoding, timm's transform to uint8, and its loader's normalising in fp32."""
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    for file in real_jpegs():
        raw = RawSample(memoryview(file.read_bytes()), memoryview(b""), 0, file.name, str(file.parent), 0)
        for crop_ratio in (0.875, 1.0, 1.13):
            theirs = create_transform(
                224, crop_pct=crop_ratio, interpolation=interpolation, crop_mode=crop_mode, use_prefetcher=True
            )
            wanted_3SS = theirs(Image.open(file).convert("RGB"))
            settings = EvalSettings(224, crop_ratio, interpolation, squash=crop_mode == "squash")
            ours_SS3 = settings(decode_image(raw), 0)
            assert wanted_3SS.dtype == torch.uint8
            assert np.array_equal(ours_SS3, wanted_3SS.permute(1, 2, 0).numpy()), (file, crop_ratio)
            loader = PrefetchLoader([(wanted_3SS[None], torch.zeros(1))], mean, std, device=torch.device("cpu"))
            ((fed_13SS, _),) = loader
            mine_13SS = normalize(torch.from_numpy(ours_SS3)[None], mean, std, torch.float32)
            assert mine_13SS.dtype == fed_13SS.dtype == torch.float32
            assert torch.allclose(mine_13SS, fed_13SS, rtol=0, atol=2e-6)  # (x − m)/s and x/s − m/s


def test_the_sizes_that_rounding_gets_wrong_are_common() -> None:
    """The case that this file is for: 375×500 at 256 has a longer side of 341.33, at 248 of 330.67, which truncates."""
    assert resized_shape(375, 500, math.floor(224 / 0.9)) == (248, 330)
    assert round(500 * 248 / 375) == 331
