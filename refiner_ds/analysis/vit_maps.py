"""Attention maps of this package's models and of timm's plain ViTs (DeiT among them), under one call.

Axes: B batch, E maps, N tokens (class token first), h×w the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refiner_ds.errors import ConfigError
from refiner_ds.models import RefinedViT

__all__ = ["attention_maps", "patch_grid", "refuse_without_maps"]


def refuse_without_maps(label: str, model: nn.Module) -> None:
    """Raise ConfigError for a model whose attention maps cannot be read."""
    if isinstance(model, RefinedViT):
        return
    blocks = _attentions(model)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not blocks or grid is None or not getattr(model, "num_prefix_tokens", 0):
        raise ConfigError(
            f"{label}: its attention maps cannot be read; give a run of this package, or one of timm's ViTs with a"
            " class token"
        )


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = model.patch_grid if isinstance(model, RefinedViT) else model.patch_embed.grid_size  # type: ignore
    return int(rows), int(columns)


@torch.inference_mode()
def attention_maps(model: nn.Module, images_B3HW: Tensor, refined: bool) -> list[Tensor]:
    """The maps of each block: [B, E, N, N], fp32; of a model without refiners they are one before and after."""
    if isinstance(model, RefinedViT):
        return model.attention_maps(images_B3HW, refined=refined)
    with _recorded(_attentions(model)) as maps:
        model(images_B3HW)
    extra = int(getattr(model, "num_prefix_tokens", 1)) - 1  # a distillation token, registers
    if not extra:
        return maps
    kept = [0, *range(1 + extra, maps[0].shape[-1])]
    return [map_BENN[:, :, kept][..., kept] for map_BENN in maps]


def _attentions(model: nn.Module) -> list[Any]:
    modules = [getattr(block, "attn", None) for block in getattr(model, "blocks", ())]
    return [module for module in modules if hasattr(module, "attn_drop") and hasattr(module, "fused_attn")]


@contextmanager
def _recorded(attentions: list[Any]) -> Iterator[list[Tensor]]:
    """What every attention hands to its dropout, which is the map; fused attention never makes one."""
    maps: list[Tensor] = []
    fused = [attention.fused_attn for attention in attentions]
    hooks = [
        attention.attn_drop.register_forward_hook(lambda module, args, out: maps.append(args[0].float()))
        for attention in attentions
    ]
    for attention in attentions:
        attention.fused_attn = False
    try:
        yield maps
    finally:
        for attention, before, hook in zip(attentions, fused, hooks, strict=True):
            attention.fused_attn = before
            hook.remove()
