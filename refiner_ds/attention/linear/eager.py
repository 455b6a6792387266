"""The paper's refiner by the equations, under autograd.

Axes: B batch, H heads, E expanded maps, N tokens.
"""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.weights import LinearWeights

__all__ = ["refined_map"]


def refined_map(map_BHNN: Tensor, weights: LinearWeights, scale: float, mask_BN: Tensor | None = None) -> Tensor:
    """Refined maps, [B, H, N, N]; [B, E, N, N] without reduction.

    A mask changes nothing here: maps that are zero outside it stay zero until they are convolved.
    """
    expanded_BENN = map_BHNN if weights.expand_EH is None else equations.expand(map_BHNN, weights.expand_EH)
    local_BENN = equations.local_attention(expanded_BENN, weights.local)
    reduced_BHNN = local_BENN if weights.reduce_HE is None else equations.reduce(local_BENN, weights.reduce_HE)
    return reduced_BHNN * scale
