"""Class-folder trees of small images to make shards of."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] = (24, 18)) -> bytes:
    """An image file with random smooth content."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of 10, 13 and 17 images."""
    folder = tmp_path / "images"
    for number, (name, count) in enumerate({"n01": 10, "n02": 13, "n03": 17}.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            (folder / name / f"{name}_{image}.JPEG").write_bytes(picture(100 * number + image))
    return folder


def published_maps(tree: Path, folder: Path, rows: int = 4) -> Path:
    """A published score map for every image of a tree; each one's values tell its image."""
    for number, image in enumerate(sorted(tree.rglob("*.JPEG"))):
        path = folder / image.parent.name / f"{image.stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.full((2, rows, 5), float(number))
        classes = torch.tensor([int(image.parent.name[1:]) - 1, 0])[:, None, None].expand(2, rows, 5)
        torch.save(torch.stack([values, classes.float()]).half(), path)
    return folder
