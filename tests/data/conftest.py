"""Small shard sets of real and painted images."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refiner_ds.config.schema import AugmentKeys
from refiner_ds.data.augment import AugmentSettings
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.writer import SetWriter


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The packaged digits, training part."""
    return open_index("package:digits/train", tmp_path_factory.mktemp("cache"))


def views(img_size: int, **keys: Any) -> AugmentSettings:
    """Training views with nothing but crop and flip, unless ``keys`` of the recipe say otherwise."""
    plain = {"auto_augment": "", "color_jitter": 0.0, "random_erasing": 0.0}
    return AugmentSettings(img_size, AugmentKeys(**{**plain, **keys}))


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., ShardIndex]:
    """Make a set of ``count`` plain 8×8 images; image number i is of colour i and class i mod 3."""

    def make(count: int, per_shard: int = 7, name: str = "set") -> ShardIndex:
        with SetWriter(tmp_path / name, ["a", "b", "c"], per_shard) as writer:
            for number in range(count):
                pixels = np.full((8, 8, 3), number % 256, np.uint8)
                writer.add(f"{number:05d}-{name}", png(pixels), "png", number % 3)
        return ShardIndex.load(tmp_path / name)

    return make
