"""A map made, and the values of its own block multiplied with it, whose way back writes no map for that.

    q, k (+ the residual map) ──> A ──> A·V
    ∂A (of those that A was residual to) + ∂out·Vᵀ ──> ∂q, ∂k      the sum lives in registers alone

Otherwise ∂out·Vᵀ is written, then read and added to the rest by autograd, 8 bytes an entry in half precision.
Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refiner_ds.attention import lean_map
from refiner_ds.attention.fused.maps import make_map, score_gradients, seed_of, softmax_map
from refiner_ds.attention.weights import DeferredMap

__all__ = ["attend"]


class _Attend(torch.autograd.Function):
    """(q, k, value, residual map or None) to the output and the map; keeps all but the residual map, and A."""

    @staticmethod
    def forward(
        ctx: Any, q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor, residual_BHNN: Tensor | None,
        scale: float, dropout: float, seed: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        map_BHNN, lse_BHN = softmax_map(q_BHNd, k_BHNd, scale, residual_BHNN, dropout, seed)
        ctx.save_for_backward(q_BHNd, k_BHNd, value_BHNd, lse_BHN, map_BHNN)
        ctx.how = scale, dropout, seed
        ctx.residual = None if residual_BHNN is None else residual_BHNN.dtype
        ctx.set_materialize_grads(False)
        return map_BHNN @ value_BHNd, map_BHNN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHNd: Tensor | None, grad_BHNN: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, dropout, seed = ctx.how
        q_BHNd, k_BHNd, value_BHNd, lse_BHN, map_BHNN = ctx.saved_tensors
        attended = None if grad_BHNd is None else (grad_BHNd, value_BHNd)
        dq_BHNd, dk_BHNd, d_residual_BHNN = score_gradients(
            q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, ctx.residual, dropout, seed, attended
        )
        d_value_BHNd = None if grad_BHNd is None else map_BHNN.mT @ grad_BHNd
        return dq_BHNd, dk_BHNd, d_value_BHNd, d_residual_BHNN, None, None, None


def attend(scores: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``attention.attend``: the output [B, H, N, d], and the map [B, H, N, N] in the values' dtype."""
    device, q_BHNd = value_BHNd.device.type, scores.q_BHNd
    cast = torch.is_autocast_enabled(device) and value_BHNd.dtype != torch.get_autocast_dtype(device)
    alike = (value_BHNd.shape, value_BHNd.dtype) == (q_BHNd.shape, q_BHNd.dtype)
    if cast or not alike or scores.dropout >= 1:
        map_BHNN = make_map(scores, residual_BHNN).to(value_BHNd.dtype)
        return lean_map.attend(map_BHNN, value_BHNd), map_BHNN
    how = scores.scale, scores.dropout, seed_of(scores)
    return _Attend.apply(q_BHNd, scores.k_BHNd, value_BHNd, residual_BHNN, *how)
