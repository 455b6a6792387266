"""The released models' refiner by the equations, under autograd; with its norms, and with its norms folded.

Axes: B batch, H heads, E expanded maps, N tokens, C any of the maps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.masking import outside_mask, real_entries
from refiner_ds.attention.norms import Norm, batch_norm, masked_batch_norm
from refiner_ds.attention.weights import BottleneckWeights, FoldedWeights

__all__ = ["folded_map", "refined_map"]


def refined_map(map_BHNN: Tensor, weights: BottleneckWeights, scale: float, mask_BN: Tensor | None = None) -> Tensor:
    """Refined maps, [B, H, N, N]; norms in training mode update their running statistics.

    Under a mask the batch's statistics are those of real entries, and what is activated outside them is zero, as it
    is outside the map; the refined map has any numbers there, and must meet zero values.
    """
    padding = None if mask_BN is None else (outside_mask(mask_BN), real_entries(mask_BN))

    def normalise(x: Tensor, norm: Norm) -> Tensor:
        return batch_norm(x, norm) if padding is None else masked_batch_norm(x, norm, *padding)

    def activate(x: Tensor, norm: Norm) -> Tensor:
        return F.relu6(normalise(x, norm))

    expanded_BENN = activate(equations.expand(map_BHNN, weights.expand_EH), weights.norm1_E)
    if padding is not None:
        expanded_BENN = expanded_BENN.masked_fill(padding[0], 0.0)
    local_BENN = activate(equations.local_attention(expanded_BENN, weights.local), weights.norm2_E)
    reduced_BHNN = normalise(equations.reduce(local_BENN, weights.reduce_HE), weights.norm3_H)
    return normalise(reduced_BHNN + map_BHNN, weights.adapt_H) * scale


def folded_map(map_BHNN: Tensor, weights: FoldedWeights, scale: float, mask_BN: Tensor | None = None) -> Tensor:
    """Refined maps, [B, H, N, N]; the folded weights contain ``scale`` already."""

    def column(x_C: Tensor) -> Tensor:
        return x_C[:, None, None]

    expanded_BENN = F.relu6(equations.expand(map_BHNN, weights.expand_EH) + column(weights.bias1_E))
    if mask_BN is not None:
        expanded_BENN = expanded_BENN.masked_fill(outside_mask(mask_BN), 0.0)
    local_BENN = equations.local_attention(expanded_BENN, weights.local)
    local_BENN = local_BENN if weights.gain2_E is None else local_BENN * column(weights.gain2_E)
    local_BENN = F.relu6(local_BENN + column(weights.bias2_E))
    reduced_BHNN = equations.reduce(local_BENN, weights.reduce_HE)
    return reduced_BHNN + column(weights.gain_H) * map_BHNN + column(weights.shift_H)
