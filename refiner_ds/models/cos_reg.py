"""cos-reg: how alike the maps of neighbouring blocks are. Axes: B batch, E maps, N tokens."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["neighbour_similarity"]


def neighbour_similarity(maps: list[Tensor]) -> Tensor:
    """Mean cosine similarity, row by row, of each map with the same head's in the next block, a scalar in fp32.

    Args:
        maps: one [B, E, N, N] a block, in order.
    Raises:
        ValueError: there are fewer than two.
    """
    if len(maps) < 2:
        raise ValueError("cos-reg compares neighbouring blocks, but the model has only one")
    rows = [F.cosine_similarity(one.float(), two.float(), dim=-1).mean() for one, two in pairwise(maps)]
    return torch.stack(rows).mean()
