"""The attention map by the equations, under autograd.

Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.weights import DeferredMap

__all__ = ["make_map"]


def make_map(deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
    """softmax(scale·QKᵀ) + scale·residual in fp32, with dropout, [B, H, N, N] in the queries' dtype."""
    map_BHNN = equations.attention_map(deferred.q_BHNd, deferred.k_BHNd, deferred.scale, deferred.mask_BN)
    if residual_BHNN is not None:
        map_BHNN = equations.accumulate(map_BHNN, residual_BHNN, deferred.scale)
    return F.dropout(map_BHNN, deferred.dropout).to(deferred.q_BHNd.dtype)
