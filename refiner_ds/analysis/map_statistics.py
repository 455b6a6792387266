"""Numbers that say what attention maps are like; refined maps, whose rows need not sum to one or be positive, included.

Axes: B batch, E maps, N tokens (the first C of them class tokens), P patches, D width, h×w the patch grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_distance", "attention_entropy", "head_similarity", "token_similarity"]


def head_similarity(map_BENN: Tensor) -> float:
    """Mean cosine similarity of the maps of two different heads, over all pairs and images; 1: heads are all alike."""
    unit_BEM = torch.nn.functional.normalize(map_BENN.double().flatten(2), dim=-1)
    return _mean_of_pairs(unit_BEM)


def token_similarity(tokens_BPD: Tensor) -> float:
    """Mean cosine similarity of two different tokens of an image; 1: all tokens are one (over-smoothing)."""
    return _mean_of_pairs(torch.nn.functional.normalize(tokens_BPD.double(), dim=-1))


def attention_entropy(map_BENN: Tensor) -> Tensor:
    """Mean entropy of a row of each map, [E], nats: from 0 (one key) to log N (all keys alike).

    Rows are taken by magnitude and made to sum to one; an all-zero row has entropy 0.
    """
    share_BENN = _shares(map_BENN)
    return torch.special.entr(share_BENN).sum(-1).mean((0, 2))


def attention_distance(map_BENN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance between a query patch and the patches it attends to, [E], in patches (Dosovitskiy et al., 2021).

    Rows are taken by magnitude over patches alone and made to sum to one.

    Raises:
        ValueError: the maps have fewer tokens than the grid has patches.
    """
    rows, columns = grid
    prefix = map_BENN.shape[-1] - rows * columns
    if prefix < 0:
        raise ValueError(f"maps of {map_BENN.shape[-1]} tokens cannot lie on a grid of {rows}x{columns} patches")
    place_P2 = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double().to(map_BENN.device)
    distance_PP = torch.cdist(place_P2, place_P2)
    share_BEPP = _shares(map_BENN[..., prefix:, prefix:])
    return (share_BEPP * distance_PP).sum(-1).mean((0, 2))


def _shares(map_BENN: Tensor) -> Tensor:
    size_BENN = map_BENN.double().abs()
    return size_BENN / size_BENN.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _mean_of_pairs(unit_BMD: Tensor) -> float:
    count = unit_BMD.shape[1]
    if count < 2:
        return 1.0
    # Over all pairs, the sum of cosines is the squared length of the sum; each vector's own 1 is taken off again.
    everything_B = unit_BMD.sum(1).square().sum(-1)
    own_B = unit_BMD.square().sum((1, 2))
    return float(((everything_B - own_B) / (count * (count - 1))).mean())
