"""One function for each thing a block does with maps, and the choice of how it is computed.

    attend   q, k, v (+ the map handed on) ──> A·V and A       a block that makes a map
    refine   A, or q and k, and v ──> refined A·V              a block that refines one
    plain    q, k, v ──> A·V                                   a block of a plain ViT

REFINER_ATTENTION, or ``way``, names the way; without either the fastest that knows the case is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import composed, reference
from refiner_ds.attention.parameters import Refiner, Scores

__all__ = ["WAYS", "attend", "plain", "refine", "way_chosen"]

# name -> (map, value, refiner, scale) to (refined map times value, refined map)
WAYS: dict[str, Callable[[Tensor, Tensor, Refiner, float], tuple[Tensor, Tensor]]] = {"reference": composed.refine}


def way_chosen(way: str | None = None) -> str:
    """The way that will be used: ``way``, else REFINER_ATTENTION, else the default.

    Raises:
        ValueError: no way has that name.
    """
    name = way or os.environ.get("REFINER_ATTENTION", "") or "reference"
    if name not in WAYS:
        raise ValueError(f"REFINER_ATTENTION is {name!r}; it must be one of {', '.join(WAYS)}")
    return name


def attend(scores: Scores, value_BHNd: Tensor, handed_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Make the map of a block, with what the block before handed on, and multiply the values with it.

    Args:
        scores: queries and keys, their scale and dropout.
        value_BHNd: values.
        handed_BHNN: the map of the block before, added scale times; ``None`` in the first block.
    Returns:
        [B, H, N, d], and the map [B, H, N, N] to hand on, both in the values' dtype.
    """
    map_BHNN = composed.make_map(scores, handed_BHNN).to(value_BHNd.dtype)
    return reference.attend(map_BHNN, value_BHNd), map_BHNN


def refine(
    attn: Tensor | Scores, value_BHNd: Tensor, refiner: Refiner, scale: float = 1.0, way: str | None = None
) -> Tensor:
    """Refine attention maps and multiply the values with them.

    Args:
        attn: the maps, [B, H, N, N], or the queries and keys they come from.
        value_BHNd: values.
        refiner: kind and weights; norms in training mode have their running statistics updated here, once.
        scale: factor on the refined maps (a :class:`FoldedRefiner` holds it already).
        way: how to compute it; ``None`` leaves the choice to REFINER_ATTENTION and to what is fastest.
    Returns:
        [B, H, N, d] in the values' dtype; [B, E, N, d] where the refiner does not reduce.
    Raises:
        ValueError: no way has that name.
    """
    compute = WAYS[way_chosen(way)]
    # The view gathers the refiner's own gradients of the map before those of its other users, so that the sum is
    # rounded in the same order whether or not the refiner is recomputed by itself.
    map_BHNN = composed.make_map(attn) if isinstance(attn, Scores) else attn.view_as(attn)
    return compute(map_BHNN.to(value_BHNd.dtype), value_BHNd, refiner, scale)[0]


def plain(scores: Scores, value_BHNd: Tensor) -> Tensor:
    """Softmax attention without a refiner, by PyTorch's fused kernels, [B, H, N, d]."""
    return F.scaled_dot_product_attention(
        scores.q_BHNd, scores.k_BHNd, value_BHNd, dropout_p=scores.dropout, scale=scores.scale
    )
