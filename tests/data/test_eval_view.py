"""An image is evaluated at the sizes, places and pixels of torchvision's and timm's own transforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import _compute_resized_output_size

from refiner_ds.data.augment import EvalSettings, eval_view, resize, resized_shape


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


@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 1.0, 1.13])
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_timms_but_for_the_resamplers_rounding(shape: tuple[int, int], crop_ratio: float) -> None:
    """A size or a place that is one off moves every edge of the picture, which shows far beyond a grey level or two."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, shape[0] // 8), max(2, shape[1] // 8), 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BILINEAR)
    theirs = create_transform(224, crop_pct=crop_ratio, interpolation="bicubic", normalize=False, is_training=False)
    wanted_SS3 = theirs(picture).permute(1, 2, 0).numpy().astype(int)
    image_yx3 = np.array(picture)
    ours_SS3 = eval_view(image_yx3, EvalSettings(224, crop_ratio)).astype(int)
    height, width = resized_shape(*shape, short=math.floor(224 / crop_ratio))
    pillows_yx3 = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    rounding = np.abs(resize(image_yx3, width, height, "bicubic") - pillows_yx3).max()
    assert rounding <= 3
    assert np.abs(ours_SS3 - wanted_SS3).max() <= max(1, rounding)


def test_the_sizes_that_rounding_gets_wrong_are_common() -> None:
    """The case that this file is for: 375×500 at 256 has a longer side of 341.33, at 248 of 330.67, which truncates."""
    assert resized_shape(375, 500, math.floor(224 / 0.9)) == (248, 330)
    assert round(500 * 248 / 375) == 331
