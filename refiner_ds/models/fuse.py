"""Fold norms and scales into their neighbours, for inference.

    stem       conv ─ norm                        ──> conv with bias
    refiner    expand ─ norm ─ local ─ norm ─ …   ──> attention.FoldedWeights
    MLP        fc2 · scale                        ──> fc2

Folding is computed in float64 and stored in the weights' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refiner_ds.attention import BatchNorm, fold_refiner, running_affine, scaled
from refiner_ds.models.blocks import Block
from refiner_ds.models.refiners import DLA, FoldedDLA
from refiner_ds.models.stem import ConvStem

__all__ = ["fuse_block", "fuse_stem"]


@torch.no_grad()
def fuse_stem(stem: ConvStem) -> None:
    """Fold the stem's norms into its convolutions, in place; twice is the same as once."""
    for index in (1, 2, 3):
        norm = getattr(stem, f"bn{index}")
        if isinstance(norm, BatchNorm):
            setattr(stem, f"conv{index}", _fold_conv(getattr(stem, f"conv{index}"), norm))
            setattr(stem, f"bn{index}", nn.Identity())


@torch.no_grad()
def fuse_block(block: Block) -> None:
    """Fold a block's refiner norms and the scale of its MLP, in place; twice is the same as once."""
    if (scale := block.mlp.scale_channel) is not None:
        _scale_outputs(block.mlp.fc2, scale.double())
        block.mlp.scale_channel = None
    dla = getattr(block.attn, "DLA", None)
    if isinstance(dla, DLA):
        tensors = dla.tensors(block.attn.grid, block.attn.adapt_bn)
        block.attn.DLA = FoldedDLA(fold_refiner(tensors, block.attn.refined_scale))
        block.attn.adapt_bn = nn.Identity()


def _fold_conv(conv: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    gain, shift = running_affine(norm.as_norm())
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
    conv.weight = nn.Parameter(scaled(conv.weight, gain).to(conv.weight.dtype))
    return conv


def _scale_outputs(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight = nn.Parameter(scaled(linear.weight, scale).to(linear.weight.dtype))
    linear.bias = nn.Parameter((linear.bias.double() * scale).to(linear.bias.dtype))
