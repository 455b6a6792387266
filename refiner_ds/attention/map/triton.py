"""The attention map by kernels, and its product with the values of its own block.

    q, k (+ residual map) ──> A ──> A·V
    ∂A (from the next block, as its residual map) + ∂out·Vᵀ ──> ∂q, ∂k      the sum exists in registers only

Otherwise ∂out·Vᵀ would be written, read and added by autograd, 8 bytes an entry in half precision.
Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention.first_order import first_order
from refiner_ds.attention.map import tiled
from refiner_ds.attention.map.triton_kernels import score_gradients, softmax_map
from refiner_ds.attention.weights import DeferredMap

__all__ = ["attend", "dropout_seed", "make_map"]


class _MakeMap(torch.autograd.Function):
    """(q, k, residual map or None) to the map; saves q, k and the log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, q_BHNd: Tensor, k_BHNd: Tensor, residual_BHNN: Tensor | None, scale: float, dropout: float, seed: int
    ) -> Tensor:
        map_BHNN, lse_BHN = softmax_map(q_BHNd, k_BHNd, scale, residual_BHNN, dropout, seed)
        ctx.save_for_backward(q_BHNd, k_BHNd, lse_BHN)
        ctx.how = scale, dropout, seed
        ctx.residual = None if residual_BHNN is None else residual_BHNN.dtype
        return map_BHNN

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_BHNN: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout, seed = ctx.how
        q_BHNd, k_BHNd, lse_BHN = ctx.saved_tensors
        grads = score_gradients(q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, ctx.residual, dropout, seed)
        return *grads, None, None, None


def make_map(deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
    """As ``eager.make_map``, [B, H, N, N] in the queries' dtype, saving q, k and the log-sum-exps for backward.

    Dropout draws one seed from torch's global CPU generator, so that checkpointing repeats it.
    """
    if deferred.dropout >= 1:
        return make_map(deferred._replace(dropout=0.0), residual_BHNN) * 0
    q_BHNd, k_BHNd, scale, dropout = deferred
    return _MakeMap.apply(q_BHNd, k_BHNd, residual_BHNN, scale, dropout, dropout_seed(deferred))


def dropout_seed(deferred: DeferredMap) -> int:
    """A seed for the map's dropout, drawn from torch's global CPU generator; 0, and nothing drawn, without dropout."""
    return int(torch.randint(2**30, ())) if deferred.dropout else 0


class _Attend(torch.autograd.Function):
    """(q, k, value, residual map or None) to the output and the map; saves q, k, value and A."""

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
    @first_order
    def backward(ctx: Any, grad_BHNd: Tensor | None, grad_BHNN: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, dropout, seed = ctx.how
        q_BHNd, k_BHNd, value_BHNd, lse_BHN, map_BHNN = ctx.saved_tensors
        attended = None if grad_BHNd is None else (grad_BHNd, value_BHNd)
        dq_BHNd, dk_BHNd, d_residual_BHNN = score_gradients(
            q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, ctx.residual, dropout, seed, attended
        )
        d_value_BHNd = None if grad_BHNd is None else map_BHNN.mT @ grad_BHNd
        return dq_BHNd, dk_BHNd, d_value_BHNd, d_residual_BHNN, None, None, None


def attend(deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``attention.attend``: the output [B, H, N, d], and the map [B, H, N, N] in the values' dtype."""
    device, q_BHNd = value_BHNd.device.type, deferred.q_BHNd
    cast = torch.is_autocast_enabled(device) and value_BHNd.dtype != torch.get_autocast_dtype(device)
    alike = (value_BHNd.shape, value_BHNd.dtype) == (q_BHNd.shape, q_BHNd.dtype)
    if cast or not alike or deferred.dropout >= 1:
        map_BHNN = make_map(deferred, residual_BHNN).to(value_BHNd.dtype)
        return tiled.attend(map_BHNN, value_BHNd), map_BHNN
    how = deferred.scale, deferred.dropout, dropout_seed(deferred)
    return _Attend.apply(q_BHNd, deferred.k_BHNd, value_BHNd, residual_BHNN, *how)
