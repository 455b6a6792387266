"""The attention map by kernels, and its product with the values of its own block.

    q, k (+ residual map) ──> A ──> A·V
    ∂A (from the next block, as its residual map) + ∂out·Vᵀ ──> ∂q, ∂k      the sum exists in registers only

Otherwise ∂out·Vᵀ would be written, read and added by autograd, 8 bytes an entry in half precision.
Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.dropout import dropout_seed
from refiner_ds.attention.map import operators, tiled
from refiner_ds.attention.weights import DeferredMap

__all__ = ["attend", "make_map"]

SEED_BITS = 30  # kernels take it as a 32-bit integer with a sign


def make_map(deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
    """As ``eager.make_map``, [B, H, N, N] in the queries' dtype, saving q, k and the log-sum-exps for backward."""
    if deferred.dropout >= 1:
        return make_map(deferred._replace(dropout=0.0), residual_BHNN) * 0
    return operators.make_map("triton", deferred, residual_BHNN, dropout_seed(deferred, SEED_BITS))


def attend(deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``attention.attend``: the output [B, H, N, d], and the map [B, H, N, N] in the values' dtype."""
    device, q_BHNd = value_BHNd.device.type, deferred.q_BHNd
    cast = torch.is_autocast_enabled(device) and value_BHNd.dtype != torch.get_autocast_dtype(device)
    alike = (value_BHNd.shape, value_BHNd.dtype) == (q_BHNd.shape, q_BHNd.dtype)
    if cast or not alike or deferred.dropout >= 1:
        map_BHNN = make_map(deferred, residual_BHNN).to(value_BHNd.dtype)
        return tiled.attend(map_BHNN, value_BHNd), map_BHNN
    return operators.attend(deferred, value_BHNd, residual_BHNN, dropout_seed(deferred, SEED_BITS))
