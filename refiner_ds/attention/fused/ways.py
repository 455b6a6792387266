"""The way "fused": which cases it knows, and what computes each.

    BottleneckRefiner in training                  bottleneck.py     keeps A, and two stacks if told to
    LinearRefiner                                  linear.py         keeps q, k, v and a row statistic, or A and v
    FoldedRefiner, BottleneckRefiner evaluating    inference.py      keeps nothing
    a freshly made map                             maps.py           keeps q, k and a row statistic

Fused knows what lean knows, but for float64 and kernels other than 1×1 and 3×3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention import lean
from refiner_ds.attention.bottleneck_function import refine_in_training
from refiner_ds.attention.folding import fold_refiner
from refiner_ds.attention.fused.bottleneck import KernelPasses
from refiner_ds.attention.fused.inference import refine_folded
from refiner_ds.attention.fused.launching import runs_on
from refiner_ds.attention.fused.linear import refine_linear
from refiner_ds.attention.fused.maps import make_map
from refiner_ds.attention.parameters import (
    FoldedRefiner,
    LinearRefiner,
    Refiner,
    Scores,
)

__all__ = ["knows", "knows_maps", "make_map", "refine", "runs_on"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (1, 3)


def knows_maps(scores: Scores) -> bool:
    """Whether this map can be made by a kernel."""
    return scores.q_BHNd.dtype in DTYPES and runs_on(scores.q_BHNd.device)


def knows(attn: Tensor | Scores, value_BHNd: Tensor, refiner: Refiner) -> bool:
    """Whether :func:`refine` computes this case."""
    if value_BHNd.dtype not in DTYPES or not runs_on(value_BHNd.device):
        return False
    return lean.knows(attn, value_BHNd, refiner) and refiner.local.kernels[0].shape[-1] in KERNEL_SIZES


def refine(attn: Tensor | Scores, value_BHNd: Tensor, refiner: Refiner, scale: float, keep: str) -> Tensor:
    """Refined maps times values, [B, M, N, d], for what :func:`knows` says yes to; as ``lean.refine``."""
    if isinstance(refiner, LinearRefiner):
        return refine_linear(attn, value_BHNd, refiner, scale)
    map_BHNN = (make_map(attn) if isinstance(attn, Scores) else attn).to(value_BHNd.dtype)
    if isinstance(refiner, FoldedRefiner):
        return refine_folded(map_BHNN, value_BHNd, refiner)
    if not refiner.norm1_E.training:
        return refine_folded(map_BHNN, value_BHNd, fold_refiner(refiner, scale))
    kept = lean.stacks_or_map(keep, map_BHNN, refiner.expand_EH.shape[0])
    return refine_in_training(map_BHNN, value_BHNd, refiner, scale, kept, KernelPasses)
