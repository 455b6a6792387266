"""The plain composition: the reference's equations under autograd, every map written out. The way "eager".

    map or DeferredMap ── refined_map ──> [B,E,N,N] ── attend ──> [B,E,N,d]

Axes: B batch, H heads, E expanded maps (H again after reduction), N tokens, d head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.norms import Norm, batch_norm
from refiner_ds.attention.weights import (
    BottleneckWeights,
    DeferredMap,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    RefinerWeights,
)

__all__ = ["make_map", "refine", "refined_map"]


def make_map(scores: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
    """The map of ``scores``, plus scale times the one handed on, in the queries' dtype; softmax and sum are fp32.

    Returns:
        [B, H, N, N].
    """
    map_BHNN = equations.attention_map(scores.q_BHNd, scores.k_BHNd, scores.scale)
    if residual_BHNN is not None:
        map_BHNN = equations.accumulate(map_BHNN, residual_BHNN, scores.scale)
    return F.dropout(map_BHNN, scores.dropout).to(scores.q_BHNd.dtype)


def refined_map(map_BHNN: Tensor, refiner: RefinerWeights, scale: float) -> Tensor:
    """The map a refined block multiplies its values with, [B, H, N, N] ([B, E, N, N] without reduction)."""
    if isinstance(refiner, LinearWeights):
        return _linear(map_BHNN, refiner) * scale
    if isinstance(refiner, FoldedWeights):
        return _folded(map_BHNN, refiner)
    return _bottleneck(map_BHNN, refiner) * scale


def refine(map_BHNN: Tensor, value_BHNd: Tensor, refiner: RefinerWeights, scale: float) -> tuple[Tensor, Tensor]:
    """Refined maps times values, [B, E, N, d], and those maps."""
    refined_BENN = refined_map(map_BHNN, refiner, scale)
    return equations.attend(refined_BENN, value_BHNd), refined_BENN


def _local(map_BENN: Tensor, local: LocalKernels) -> Tensor:
    if local.constraint == "none":
        return equations.distributed_local_attention(map_BENN, local.kernels[0])
    if local.constraint == "spatial":
        keys_E1kk, queries_E1kk = local.kernels
        return equations.spatial_local_attention(map_BENN, keys_E1kk, queries_E1kk, local.grid)
    rows, columns, query_rows, query_columns = local.kernels
    return equations.row_and_column_local_attention(map_BENN, (rows, columns, query_rows, query_columns), local.grid)


def _linear(map_BHNN: Tensor, refiner: LinearWeights) -> Tensor:
    wide_BENN = map_BHNN if refiner.expand_EH is None else equations.expand(map_BHNN, refiner.expand_EH)
    local_BENN = _local(wide_BENN, refiner.local)
    return local_BENN if refiner.reduce_HE is None else equations.reduce(local_BENN, refiner.reduce_HE)


def _bottleneck(map_BHNN: Tensor, refiner: BottleneckWeights) -> Tensor:
    def activate(x: Tensor, norm: Norm) -> Tensor:
        return F.relu6(batch_norm(x, norm))

    wide_BENN = activate(equations.expand(map_BHNN, refiner.expand_EH), refiner.norm1_E)
    local_BENN = activate(_local(wide_BENN, refiner.local), refiner.norm2_E)
    narrow_BHNN = batch_norm(equations.reduce(local_BENN, refiner.project_HE), refiner.norm3_H)
    return batch_norm(narrow_BHNN + map_BHNN, refiner.adapt_H)


def _folded(map_BHNN: Tensor, refiner: FoldedWeights) -> Tensor:
    def column(x_C: Tensor) -> Tensor:
        return x_C[:, None, None]

    wide_BENN = F.relu6(equations.expand(map_BHNN, refiner.expand_EH) + column(refiner.bias1_E))
    local_BENN = _local(wide_BENN, refiner.local)
    local_BENN = local_BENN if refiner.gain2_E is None else local_BENN * column(refiner.gain2_E)
    local_BENN = F.relu6(local_BENN + column(refiner.bias2_E))
    narrow_BHNN = equations.reduce(local_BENN, refiner.project_HE)
    return narrow_BHNN + column(refiner.gain_H) * map_BHNN + column(refiner.shift_H)
