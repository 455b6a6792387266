"""Fold norms and scales into their neighbours, for inference.

    stem       conv ─ norm                        ──> conv with bias
    refiner    expand ─ norm ─ local ─ norm ─ …   ──> attention.FoldedWeights
    MLP        fc2 · scale                        ──> fc2

Folding is computed in float64 and stored in the weights' own precision.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from refiner_ds.attention import Norm, fold_refiner, running_affine, scaled
from refiner_ds.models.attention import attention_of
from refiner_ds.models.blocks import Block
from refiner_ds.models.direct import batch_norm_tensors, can_read
from refiner_ds.models.mlp import ScaledMlp
from refiner_ds.models.refiners import DLA, FoldedDLA
from refiner_ds.models.stem import ConvStem

__all__ = ["fuse_block", "fuse_stem", "refuse_unfoldable"]


def refuse_unfoldable(stem: ConvStem, blocks: Iterable[Block]) -> None:
    """Refuse layers that compute more than their weights say, before anything is changed.

    Raises:
        ValueError: an adapter, a hook, or a norm without running statistics of its own; one sentence.
    """
    layers = {"patch_embed": isinstance(stem, ConvStem)}
    for index in (1, 2, 3) if layers["patch_embed"] else ():
        norm = getattr(stem, f"bn{index}")
        layers[f"patch_embed.conv{index}"] = can_read(getattr(stem, f"conv{index}"), nn.Conv2d)
        layers[f"patch_embed.bn{index}"] = isinstance(norm, nn.Identity) or batch_norm_tensors(norm) is not None
    for index, block in enumerate(blocks):
        name = f"blocks.{index}"
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if attn is None or not isinstance(mlp, ScaledMlp):
            layers[name if attn is None else f"{name}.mlp"] = False
            continue
        layers[f"{name}.mlp.fc2"] = mlp.scale_channel is None or can_read(mlp.fc2, nn.Linear)
        layers[f"{name}.attn"] = attn is attention_of(block) and (
            not hasattr(attn, "weights") or attn.weights() is not None
        )
    if unfoldable := [name for name, foldable in layers.items() if not foldable]:
        raise ValueError(
            f"{', '.join(unfoldable)} cannot be folded: they compute more than their weights say;"
            " merge adapters and remove hooks first"
        )


@torch.no_grad()
def fuse_stem(stem: ConvStem) -> None:
    """Fold the stem's norms into its convolutions, in place; twice is the same as once."""
    for index in (1, 2, 3):
        tensors = batch_norm_tensors(getattr(stem, f"bn{index}"))
        if tensors is not None:
            _fold_conv(getattr(stem, f"conv{index}"), tensors)
            setattr(stem, f"bn{index}", nn.Identity())


@torch.no_grad()
def fuse_block(block: Block) -> None:
    """Fold a block's refiner norms and the scale of its MLP, in place; twice is the same as once."""
    if (scale := block.mlp.scale_channel) is not None:
        _scale_outputs(block.mlp.fc2, scale.double())
        block.mlp.scale_channel = None
    if isinstance(getattr(block.attn, "DLA", None), DLA):
        block.attn.DLA = FoldedDLA(fold_refiner(block.attn.weights(), block.attn.refined_scale))
        block.attn.adapt_bn, block.attn.refined_scale = nn.Identity(), 1.0


def _fold_conv(conv: nn.Conv2d, norm: Norm) -> None:
    gain, shift = running_affine(norm)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
    conv.weight = nn.Parameter(scaled(conv.weight, gain).to(conv.weight.dtype))


def _scale_outputs(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight = nn.Parameter(scaled(linear.weight, scale).to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias = nn.Parameter((linear.bias.double() * scale).to(linear.bias.dtype))
