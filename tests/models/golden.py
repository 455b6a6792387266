"""The golden numbers of the released model, and a model of ours that holds its weights.

data/official_tiny.npz was computed with the authors' code: img 64, patch 16, width 48, 4 heads, 4 blocks, 10 classes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import refiner_ds.models

TINY = {"layout": "released", "refiner": "bottleneck", "img_size": 64, "embed_dim": 48, "num_heads": 4, "depth": 4}


@cache
def numbers() -> dict[str, np.ndarray]:
    """Every array of the golden file, by its name there."""
    with np.load(Path(__file__).parent / "data" / "official_tiny.npz") as archive:
        return {name: archive[name] for name in archive.files}


def tensor(name: str) -> Tensor:
    """A fresh tensor of one golden array."""
    return torch.from_numpy(numbers()[name].copy())


def section(prefix: str) -> dict[str, Tensor]:
    """Fresh tensors of all arrays under ``prefix/``, the prefix taken off."""
    return {name.removeprefix(f"{prefix}/"): tensor(name) for name in numbers() if name.startswith(f"{prefix}/")}


def tiny_model(**options) -> refiner_ds.models.RefinedViT:
    """A freshly initialised model of the golden architecture."""
    model = timm.create_model("refined_vit", **{**TINY, "num_classes": 10, **options})
    assert isinstance(model, refiner_ds.models.RefinedViT)
    return model


def golden_model(**options) -> refiner_ds.models.RefinedViT:
    """The same with the golden weights."""
    model = tiny_model(**options)
    model.load_state_dict(section("state"))
    return model


def training_loss(class_logits_BC: Tensor, patch_logits_BPC: Tensor) -> Tensor:
    """The loss the golden gradients belong to."""
    cross_entropy = torch.nn.functional.cross_entropy
    patches = patch_logits_BPC.shape[0] * patch_logits_BPC.shape[1]
    dense = cross_entropy(patch_logits_BPC.flatten(0, 1), torch.full((patches,), 5))
    return cross_entropy(class_logits_BC, torch.tensor([1, 2, 3, 4])) + 0.5 * dense


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over largest value."""
    ours, truth = ours.detach().double(), truth.double()
    return ((ours - truth).abs().max() / truth.abs().max().clamp_min(1e-12)).item()
