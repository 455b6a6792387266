"""The way "triton": which cases it knows, and what computes each.

    BottleneckWeights in training                  bottleneck.py     keeps A, and two stacks if told to
    LinearWeights                                  linear.py         keeps q, k, v and a row statistic, or A and v
    FoldedWeights, BottleneckWeights evaluating    inference.py      keeps nothing
    a freshly made map                             maps.py           keeps q, k and a row statistic
    a map made and multiplied with                 attend.py         keeps v and the map besides

Fused knows what lean knows, but for float64 and kernels other than 1×1 and 3×3.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from refiner_ds.attention import lean
from refiner_ds.attention.fused.attend import attend
from refiner_ds.attention.fused.bottleneck import KernelPasses
from refiner_ds.attention.fused.inference import refine_folded
from refiner_ds.attention.fused.launching import runs_on
from refiner_ds.attention.fused.linear import refine_linear
from refiner_ds.attention.fused.maps import make_map
from refiner_ds.attention.weights import DeferredMap, RefinerWeights

__all__ = ["attend", "knows", "knows_maps", "make_map", "refine", "runs_on"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (1, 3)


def knows_maps(scores: DeferredMap) -> bool:
    """Whether this map can be made by a kernel."""
    return scores.q_BHNd.dtype in DTYPES and runs_on(scores.q_BHNd.device)


def knows(attn: Tensor | DeferredMap, value_BHNd: Tensor, refiner: RefinerWeights) -> bool:
    """Whether :func:`refine` computes this case."""
    if value_BHNd.dtype not in DTYPES or not runs_on(value_BHNd.device):
        return False
    return lean.knows(attn, value_BHNd, refiner) and refiner.local.kernels[0].shape[-1] in KERNEL_SIZES


# As ``lean.refine``: attn, value, refiner, scale, keep.
refine = partial(lean.refine_by, lean.Makers(make_map, refine_linear, refine_folded, KernelPasses))
