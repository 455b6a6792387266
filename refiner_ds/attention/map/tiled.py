"""The attention map without a saved softmax: queries and keys are enough to compute it again, row by row.

    q, k (+ residual map) ──> A = softmax(scale·QKᵀ) + scale·residual, dropout ──> A·V
                              └─ backward: softmax(scale·QKᵀ) again, tile by tile, in fp32

The softmax is never recovered as A − scale·residual: in half precision that difference has no digits left.
Axes: B batch, H heads, N tokens, d head width; b, R the images and query rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.dropout import dropout_seed
from refiner_ds.attention.map import operators
from refiner_ds.attention.masking import outside_rows
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiling.ops import product_dtype
from refiner_ds.attention.tiling.tiles import Tile, tiles
from refiner_ds.attention.weights import DeferredMap

__all__ = ["attend", "make_map", "map_gradients", "score_gradients", "softmax_map", "softmax_rows"]


def softmax_rows(
    q_BHNd: Tensor, k_BHNd: Tensor, scale: float, tile: Tile, rows: slice | None = None, mask_BN: Tensor | None = None
) -> Tensor:
    """A tile's rows of softmax(scale·QKᵀ), [b, H, R, N], fp32 or better; the same bits each time.

    Under a mask over the real keys, and zero for padding: then its backward is zero there too.
    """
    precision = statistics_dtype(q_BHNd.dtype)
    q_bHRd = q_BHNd[tile.images, :, rows or tile.rows].to(precision) * scale
    logits_bHRN = q_bHRd @ k_BHNd[tile.images].to(precision).mT
    if mask_BN is None:
        return logits_bHRN.softmax(-1)
    mask_bN = mask_BN[tile.images]
    least = torch.finfo(precision).min  # not −∞, which a sequence of padding alone would turn into NaN
    rows_bHRN = logits_bHRN.masked_fill_(~mask_bN[:, None, None, :], least).softmax(-1)
    return rows_bHRN.masked_fill_(outside_rows(mask_bN, rows or tile.rows), 0.0)


def score_gradients(
    softmax_bHRN: Tensor, grad_bHRN: Tensor, q_BHNd: Tensor, k_BHNd: Tensor, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Backward of the softmax's rows of a tile: ∂q for these rows [b, H, R, d], their share of ∂k [b, H, N, d]."""
    precise = softmax_bHRN.dtype
    d_logits_bHRN = torch.ops.aten._softmax_backward_data(grad_bHRN.to(precise), softmax_bHRN, -1, precise)
    dtype = product_dtype(q_BHNd)
    d_logits_bHRN = d_logits_bHRN.to(dtype)
    q_bHRd, k_bHNd = q_BHNd[tile.images, :, tile.rows].to(dtype), k_BHNd[tile.images].to(dtype)
    dq_bHRd, dk_bHNd = d_logits_bHRN @ k_bHNd, d_logits_bHRN.mT @ q_bHRd
    return dq_bHRd.to(precise).mul_(scale), dk_bHNd.to(precise).mul_(scale)


def softmax_map(
    q_BHNd: Tensor, k_BHNd: Tensor, residual_BHNN: Tensor | None, scale: float, dropout: float, seed: int,
    mask_BN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale·QKᵀ) + scale·residual, with dropout drawn from ``seed``, [B, H, N, N] in the queries' dtype."""
    batch, heads, tokens, _ = q_BHNd.shape
    precision = statistics_dtype(q_BHNd.dtype)
    map_BHNN = q_BHNd.new_empty(batch, heads, tokens, tokens)
    with torch.autocast(q_BHNd.device.type, enabled=False):
        for index, tile in enumerate(tiles(batch, tokens, heads, q_BHNd.device)):
            rows_bHRN = softmax_rows(q_BHNd, k_BHNd, scale, tile, mask_BN=mask_BN)
            if residual_BHNN is not None:
                rows_bHRN.add_(residual_BHNN[tile.images, :, tile.rows].to(precision), alpha=scale)
            if dropout:
                rows_bHRN.mul_(_dropout_factor(rows_bHRN, dropout, seed + index))
            map_BHNN[tile.images, :, tile.rows] = rows_bHRN
    return map_BHNN


def map_gradients(
    grad_BHNN: Tensor, q_BHNd: Tensor, k_BHNd: Tensor, residual: torch.dtype | None, scale: float, dropout: float,
    seed: int, mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Backward of :func:`softmax_map`: ∂q, ∂k, and ∂residual in the dtype ``residual`` if given."""
    batch, heads, tokens, _ = q_BHNd.shape
    dq_BHNd = torch.empty_like(q_BHNd)
    precision = statistics_dtype(q_BHNd.dtype)
    dk_BHNd = torch.zeros_like(k_BHNd, dtype=precision)
    d_residual_BHNN = None if residual is None else torch.empty_like(grad_BHNN, dtype=residual)
    with torch.autocast(q_BHNd.device.type, enabled=False):
        for index, tile in enumerate(tiles(batch, tokens, heads, q_BHNd.device)):
            grad_bHRN = grad_BHNN[tile.images, :, tile.rows].to(precision)
            if dropout:
                grad_bHRN = grad_bHRN * _dropout_factor(grad_bHRN, dropout, seed + index)
            if d_residual_BHNN is not None:
                d_residual_BHNN[tile.images, :, tile.rows] = grad_bHRN * scale
            softmax_bHRN = softmax_rows(q_BHNd, k_BHNd, scale, tile, mask_BN=mask_BN)
            dq_bHRd, dk_bHNd = score_gradients(softmax_bHRN, grad_bHRN, q_BHNd, k_BHNd, scale, tile)
            dq_BHNd[tile.images, :, tile.rows] = dq_bHRd
            dk_BHNd[tile.images] += dk_bHNd
    return dq_BHNd, dk_BHNd.to(k_BHNd.dtype), d_residual_BHNN


def _dropout_factor(like_bHRN: Tensor, dropout: float, seed: int) -> Tensor:
    """Factors of dropout for a tile, the same for the same seed."""
    if dropout >= 1:
        return torch.zeros_like(like_bHRN)
    generator = torch.Generator(like_bHRN.device).manual_seed(seed)
    return torch.empty_like(like_bHRN).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def make_map(deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
    """As ``eager.make_map``, [B, H, N, N] in the queries' dtype, saving q and k for backward."""
    return operators.make_map("tiled", deferred, residual_BHNN, dropout_seed(deferred, 62))


class _Attend(torch.autograd.Function):
    """(map, value) to map times value; saves both as they are."""

    @staticmethod
    def forward(ctx: Any, map_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        ctx.save_for_backward(map_BHNN, value_BHNd)
        return map_BHNN @ value_BHNd

    @staticmethod
    def backward(ctx: Any, grad_BHNd: Tensor) -> tuple[Tensor, Tensor]:
        map_BHNN, value_BHNd = ctx.saved_tensors
        return grad_BHNd @ value_BHNd.mT, map_BHNN.mT @ grad_BHNd


def attend(map_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
    """As ``equations.attend`` with one map for each head, [B, H, N, d], saving the values where they are.

    PyTorch's own product would save a contiguous copy of values that are a slice of q, k and v.
    """
    device = map_BHNN.device.type
    if torch.is_autocast_enabled(device) and value_BHNd.dtype != torch.get_autocast_dtype(device):
        return equations.attend(map_BHNN, value_BHNd)
    return map_BHNN @ value_BHNd if torch.compiler.is_compiling() else _Attend.apply(map_BHNN, value_BHNd)
