"""The way "fused": which cases it knows, and what computes each.

    a freshly made map                             maps.py           keeps q, k and a row statistic
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.fused.launching import runs_on
from refiner_ds.attention.fused.maps import make_map
from refiner_ds.attention.parameters import Refiner, Scores

__all__ = ["knows", "knows_maps", "make_map", "runs_on"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def knows_maps(scores: Scores) -> bool:
    """Whether this map can be made by a kernel."""
    return scores.q_BHNd.dtype in DTYPES and runs_on(scores.q_BHNd.device)


def knows(attn: Tensor | Scores, value_BHNd: Tensor, refiner: Refiner) -> bool:
    """Whether a kernel computes this case: not yet."""
    return False
