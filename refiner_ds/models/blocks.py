"""Transformer blocks, one and in a row.

    x ── x + gain·drop_path(attn(norm(x / gain))) ── x + gain·drop_path(mlp(norm(x / gain))) ──>

The released models have gain 2 and a learned scale behind the MLP, a plain ViT gain 1 and none.
Axes: B batch, H heads, E maps that multiply values, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from timm.layers import DropPath
from torch import Tensor, nn

from refiner_ds.attention import recompute_aware
from refiner_ds.models.attention import attention_of
from refiner_ds.models.mlp import ScaledMlp

__all__ = ["UNITS", "Block", "BlockStack", "Checkpoint"]

Checkpoint = Callable[..., Any]

# How many blocks one activation checkpoint covers; that of a refiner is set on the attention itself.
UNITS = {"pair": 2, "block": 1, "refiner": 0}


class Block(nn.Module):
    """Attention and MLP around a residual stream; see the head of this file.

    Args:
        attn: the attention, one of ``refiner_ds.models.attention``.
        mlp: the MLP.
        dim: width.
        drop_path: probability with which a sample skips each branch.
        gain: the stream is divided by it before each norm, and each branch multiplied with it.
    """

    attn: Any  # one of the four kinds; nn.Module would hide forward_with_map from a type checker

    def __init__(self, attn: nn.Module, mlp: ScaledMlp, dim: int, drop_path: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gain = gain

    def forward(self, x_BND: Tensor, residual_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The stream [B, N, D], and the map for the next block."""
        out_BND, residual_BHNN = self.attn(self.norm1(x_BND / self.gain), residual_BHNN)
        return self._add_branches(x_BND, out_BND), residual_BHNN

    def forward_with_map(
        self, x_BND: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As ``forward``, and the map [B, E, N, N] that multiplied the values."""
        out_BND, residual_BHNN, map_BENN = self.attn.forward_with_map(self.norm1(x_BND / self.gain), residual_BHNN)
        return self._add_branches(x_BND, out_BND), residual_BHNN, map_BENN

    def _add_branches(self, x_BND: Tensor, attention_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.drop_path(attention_BND) * self.gain
        return x_BND + self.drop_path(self.mlp(x_BND / self.gain, self.norm2)) * self.gain


class BlockStack(nn.ModuleList):
    """The blocks of a model, and how many of them one activation checkpoint covers."""

    def __init__(self, blocks: Iterable[nn.Module] | None = None) -> None:
        super().__init__(blocks)
        self._checkpoint: Checkpoint | None = None
        self._blocks_per_checkpoint = 0

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()

    def set_passes_map(self, passes_map: bool) -> None:
        """Let every block pass its map to the next, also where the next has no use for it, or only those that must."""
        for block in self:
            attention_of(block).passes_map = passes_map

    def set_checkpointing(self, unit: str | None, checkpoint: Checkpoint | None = None) -> None:
        """Recompute activations in backward, ``unit`` by unit (a key of :data:`UNITS`); ``None`` keeps them all.

        Args:
            checkpoint: called as ``checkpoint(function, *tensors)``; ``None`` is torch's, non-reentrant.
        """
        self._checkpoint = None if unit is None else checkpoint or _non_reentrant
        self._blocks_per_checkpoint = 0 if unit is None else UNITS[unit]
        for block in self:
            if hasattr(attn := attention_of(block), "checkpoint"):
                attn.checkpoint = self._checkpoint if unit == "refiner" else None

    def forward(self, x_BND: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stream behind the last block, and the maps that blocks made for the next, in order."""
        recompute = self._blocks_per_checkpoint if self.training and torch.is_grad_enabled() else 0
        stride = recompute or 1
        stream: tuple[Tensor, ...] = (x_BND,)
        maps: list[Tensor] = []
        for first in range(0, len(self), stride):
            blocks = list(self)[first : first + stride]
            stage = partial(_run_stage, blocks)
            if recompute and self._checkpoint is not None:
                out = self._checkpoint(recompute_aware(stage), *stream)
                out = out if isinstance(out, tuple) else (out,)
            else:
                out = stage(*stream)
            stream = out[:2]
            made = sum(attention_of(block).makes_map for block in blocks)
            maps += [*out[2:], *([out[1]] if made else [])]
        return stream[0], maps


def _run_stage(blocks: list[Any], *stream: Tensor) -> tuple[Tensor, ...]:
    """Some blocks on (x) or (x, map): the same again, and behind them the maps made before that last one."""
    x_BND, residual_BHNN = stream if len(stream) == 2 else (stream[0], None)
    made: list[Tensor] = []
    for block in blocks:
        x_BND, residual_BHNN = block(x_BND, residual_BHNN)
        made += [residual_BHNN] if attention_of(block).makes_map else []
    return (x_BND, *(() if residual_BHNN is None else (residual_BHNN,)), *made[:-1])


def _non_reentrant(function: Callable[..., Any], *tensors: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint`` in its non-reentrant form, which hooks and partial backwards survive."""
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
