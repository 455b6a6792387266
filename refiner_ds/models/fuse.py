"""Fold norms and scales into their neighbours, for inference.

    stem       conv ─ norm                        ──> conv with bias
    refiner    expand ─ norm ─ local ─ norm ─ …   ──> attention.FoldedRefiner
    MLP        fc2 · scale                        ──> fc2

Folding is computed in float64 and stored in the weights' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refiner_ds.attention import BatchNorm, BottleneckRefiner, FoldedRefiner, Norm
from refiner_ds.models.blocks import Block
from refiner_ds.models.refiners import DLA, FoldedDLA
from refiner_ds.models.stem import ConvStem

__all__ = ["fold_refiner", "fuse_block", "fuse_stem"]


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


def fold_refiner(refiner: BottleneckRefiner, scale: float) -> FoldedRefiner:
    """The bottleneck with running statistics as weights and biases, ``scale`` included.

    The second norm's gain goes into the local kernel if every entry of a map passes through it; under a constraint
    the class tokens' entries do not.
    """
    dtype = refiner.expand_EH.dtype
    gain1_E, shift1_E = _affine(refiner.norm1_E)
    gain2_E, shift2_E = _affine(refiner.norm2_E)
    gain3_H, shift3_H = _affine(refiner.norm3_H)
    gain4_H, shift4_H = (scale * x for x in _affine(refiner.adapt_H))
    local, gain2 = refiner.local, None if refiner.local.constraint == "none" else gain2_E.to(dtype)
    if gain2 is None:
        local = local._replace(kernels=(_scaled(local.kernels[0], gain2_E).to(dtype),))
    return FoldedRefiner(
        _scaled(refiner.expand_EH, gain1_E).to(dtype),
        shift1_E.to(dtype),
        local,
        gain2,
        shift2_E.to(dtype),
        _scaled(refiner.project_HE, gain4_H * gain3_H).to(dtype),
        gain4_H.to(dtype),
        (gain4_H * shift3_H + shift4_H).to(dtype),
    )


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm with running statistics as x·gain + shift, float64."""
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()


def _scaled(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.double() * gain.reshape(-1, *[1] * (weight.dim() - 1))


def _fold_conv(conv: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    gain, shift = _affine(norm.parameters_now())
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
    conv.weight = nn.Parameter(_scaled(conv.weight, gain).to(conv.weight.dtype))
    return conv


def _scale_outputs(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight = nn.Parameter(_scaled(linear.weight, scale).to(linear.weight.dtype))
    linear.bias = nn.Parameter((linear.bias.double() * scale).to(linear.bias.dtype))
