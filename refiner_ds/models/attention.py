"""The four kinds of attention a block can have; all take (x, residual map) and give (out, the map for the next block).

    MapAttention      makes a map from Q, K and the residual map, uses it, passes it on        released, even blocks
    SharedAttention   has V alone; refines the residual map, uses that, passes on the original   released, odd blocks
    RefinedAttention  makes its own map, refines it, uses that                                   the paper's
    PlainAttention    softmax attention by PyTorch's fused kernels                               a plain ViT

The last two pass a map on only where ``passes_map`` is set (cos-reg compares those).
Axes: B batch, H heads, E maps that multiply values (H unless reduction is off), N tokens, D width, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refiner_ds import attention
from refiner_ds.attention import BatchNorm, DeferredMap, RefinerWeights, equations
from refiner_ds.models.direct import can_read
from refiner_ds.models.refiners import DLA, FoldedDLA, MapRefiner

__all__ = ["AttentionOptions", "MapAttention", "PlainAttention", "RefinedAttention", "SharedAttention", "attention_of"]

ResidualMap = Tensor | None


@dataclass(frozen=True)
class AttentionOptions:
    """What every block's attention is built from.

    Args:
        dim, num_heads, qkv_bias: width, heads, and whether Q, K and V have biases.
        grid: rows and columns of the patch grid.
        refiner: "none", "linear" or "bottleneck".
        expansion_ratio, kernel_size, constraint, expand, reduce: see ``RefinedViT``.
        attn_drop, proj_drop: dropout on a freshly made map, and behind the output projection.
    """

    dim: int
    num_heads: int
    grid: tuple[int, int]
    qkv_bias: bool = True
    refiner: str = "bottleneck"
    expansion_ratio: float = 3
    kernel_size: int = 3
    constraint: str = "none"
    expand: bool = True
    reduce: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0


class _Attention(nn.Module):
    """The frame: projections in and out, and heads split and joined.

    Attributes:
        passes_map: whether a block that has no need to hands its map to the next block all the same.
    """

    passes_map = False

    def __init__(self, options: AttentionOptions, projections: int, maps_per_head: int = 1) -> None:
        super().__init__()
        self.num_heads = options.num_heads
        self.grid = options.grid
        self.scale = (options.dim // options.num_heads) ** -0.5
        self.qkv = nn.Linear(options.dim, projections * options.dim, bias=options.qkv_bias)
        self.attn_drop = options.attn_drop
        self.proj = nn.Linear(maps_per_head * options.dim, options.dim)
        self.proj_drop = nn.Dropout(options.proj_drop)

    @property
    def makes_map(self) -> bool:
        """Whether ``forward`` returns a map of its own."""
        return self.passes_map

    def _heads(self, x_BND: Tensor) -> tuple[Tensor, ...]:
        """One [B, H, N, d] for each projection that ``qkv`` makes."""
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND)
        qkv = qkv.reshape(batch, tokens, qkv.shape[-1] // width, self.num_heads, width // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _deferred_map(self, q_BHNd: Tensor, k_BHNd: Tensor) -> DeferredMap:
        return DeferredMap(q_BHNd, k_BHNd, self.scale, self.attn_drop if self.training else 0.0)

    def _join(self, out_BENd: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out_BENd.transpose(1, 2).flatten(2)))


class PlainAttention(_Attention):
    """Softmax attention."""

    def __init__(self, options: AttentionOptions) -> None:
        super().__init__(options, projections=3)

    def forward(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap]:
        """[B, N, D], and no map unless ``passes_map``."""
        q_BHNd, k_BHNd, v_BHNd = self._heads(x_BND)
        if self.passes_map:
            out_BHNd, map_BHNN = attention.attend(self._deferred_map(q_BHNd, k_BHNd), v_BHNd)
            return self._join(out_BHNd), map_BHNN
        return self._join(attention.plain_attention(self._deferred_map(q_BHNd, k_BHNd), v_BHNd)), None

    def forward_with_map(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap, Tensor]:
        """As ``forward``, and the map that multiplied the values."""
        q_BHNd, k_BHNd, v_BHNd = self._heads(x_BND)
        map_BHNN = attention.make_map(self._deferred_map(q_BHNd, k_BHNd))
        return self._join(equations.attend(map_BHNN, v_BHNd)), map_BHNN if self.passes_map else None, map_BHNN


class MapAttention(_Attention):
    """Attention with residual maps: softmax(QKᵀ/√d) + A_before/√d, which it uses and passes on (released models)."""

    def __init__(self, options: AttentionOptions) -> None:
        super().__init__(options, projections=3)

    @property
    def makes_map(self) -> bool:
        """Always."""
        return True

    def forward(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap]:
        """[B, N, D], and the map [B, H, N, N] for the next block."""
        out_BND, map_BHNN, _ = self.forward_with_map(x_BND, residual_BHNN)
        return out_BND, map_BHNN

    def forward_with_map(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap, Tensor]:
        """As ``forward``, and the map that multiplied the values: the same one."""
        q_BHNd, k_BHNd, v_BHNd = self._heads(x_BND)
        out_BHNd, map_BHNN = attention.attend(self._deferred_map(q_BHNd, k_BHNd), v_BHNd, residual_BHNN)
        return self._join(out_BHNd), map_BHNN, map_BHNN


class _Refining(_Attention):
    """The frame of both that refine: the refiner's modules, and its recomputation."""

    def __init__(self, options: AttentionOptions, projections: int) -> None:
        refiner, maps_out = _build_refiner(options)
        super().__init__(options, projections, maps_out // options.num_heads)
        if isinstance(refiner, DLA):
            self.DLA, self.adapt_bn = refiner, BatchNorm(options.num_heads)
        else:
            self.refiner = refiner
        self.refined_scale = self.scale if isinstance(refiner, DLA) else 1.0
        # A checkpoint function for the refiner alone, set by set_grad_checkpointing(unit="refiner").
        self.checkpoint: Callable[..., Any] | None = None

    def weights(self) -> RefinerWeights | None:
        """The refiner as ``attention.refine`` takes it; ``None`` where its modules have to be called one by one."""
        refiner = self.refiner if hasattr(self, "refiner") else self.DLA
        if not can_read(refiner, MapRefiner, DLA, FoldedDLA):
            return None
        return refiner.weights(self.grid, self.adapt_bn) if isinstance(refiner, DLA) else refiner.weights(self.grid)

    def _call_refiner(self, map_BHNN: Tensor) -> Tensor:
        """The refined map, every module of the refiner called."""
        if hasattr(self, "refiner"):
            return self.refiner(map_BHNN, self.grid) * self.refined_scale
        return self.adapt_bn(self.DLA(map_BHNN, self.grid)) * self.refined_scale

    def _refine(self, *tensors: Tensor) -> Tensor:
        """Map and values, or queries, keys and values, to refined maps times values."""
        *sources, v_BHNd = tensors
        source = sources[0] if len(sources) == 1 else self._deferred_map(*sources)
        if (weights := self.weights()) is not None:
            return attention.refine(source, v_BHNd, weights, self.refined_scale)
        map_BHNN = attention.make_map(source) if isinstance(source, DeferredMap) else source.to(v_BHNd.dtype)
        return equations.attend(self._call_refiner(map_BHNN), v_BHNd)

    def _refine_or_recompute(self, *tensors: Tensor) -> Tensor:
        if self.checkpoint is None or not (self.training and torch.is_grad_enabled()):
            return self._refine(*tensors)
        return self.checkpoint(attention.recompute_aware(self._refine), *tensors)

    def _refined_map(self, map_BHNN: Tensor) -> Tensor:
        if (weights := self.weights()) is not None:
            return attention.refined_map(map_BHNN, weights, self.refined_scale)
        return self._call_refiner(map_BHNN)


class SharedAttention(_Refining):
    """Values alone: refines the map of the block before and passes that map on unrefined (released models)."""

    def __init__(self, options: AttentionOptions) -> None:
        super().__init__(options, projections=1)

    def forward(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap]:
        """[B, N, D], and the map as it came."""
        assert residual_BHNN is not None
        (v_BHNd,) = self._heads(x_BND)
        return self._join(self._refine_or_recompute(residual_BHNN, v_BHNd)), residual_BHNN

    def forward_with_map(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap, Tensor]:
        """As ``forward``, and the refined map that multiplied the values."""
        assert residual_BHNN is not None
        (v_BHNd,) = self._heads(x_BND)
        map_BENN = self._refined_map(residual_BHNN.to(v_BHNd.dtype))
        return self._join(equations.attend(map_BENN, v_BHNd)), residual_BHNN, map_BENN


class RefinedAttention(_Refining):
    """Attention whose own map is refined before it multiplies the values (the paper's)."""

    def __init__(self, options: AttentionOptions) -> None:
        super().__init__(options, projections=3)

    def forward(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap]:
        """[B, N, D], and no map unless ``passes_map``: then its own, unrefined."""
        q_BHNd, k_BHNd, v_BHNd = self._heads(x_BND)
        if self.passes_map:
            map_BHNN = attention.make_map(self._deferred_map(q_BHNd, k_BHNd))
            return self._join(self._refine_or_recompute(map_BHNN, v_BHNd)), map_BHNN
        return self._join(self._refine_or_recompute(q_BHNd, k_BHNd, v_BHNd)), None

    def forward_with_map(self, x_BND: Tensor, residual_BHNN: ResidualMap) -> tuple[Tensor, ResidualMap, Tensor]:
        """As ``forward``, and the refined map that multiplied the values."""
        q_BHNd, k_BHNd, v_BHNd = self._heads(x_BND)
        map_BHNN = attention.make_map(self._deferred_map(q_BHNd, k_BHNd))
        map_BENN = self._refined_map(map_BHNN)
        return self._join(equations.attend(map_BENN, v_BHNd)), map_BHNN if self.passes_map else None, map_BENN


def attention_of(block: nn.Module) -> Any:
    """The attention in a block, through what others may have wrapped around either."""
    inner = getattr(block, "attn", None)
    if isinstance(inner, _Attention):
        return inner
    return next((module for module in block.modules() if isinstance(module, _Attention)), inner)


def _build_refiner(options: AttentionOptions) -> tuple[DLA | MapRefiner, int]:
    o = options
    refiner: DLA | MapRefiner
    if o.refiner == "bottleneck":
        refiner = DLA(o.num_heads, o.expansion_ratio, o.kernel_size, o.constraint)
    else:
        refiner = MapRefiner(o.num_heads, o.expansion_ratio, o.kernel_size, o.constraint, o.expand, o.reduce)
    return refiner, refiner.maps_out
