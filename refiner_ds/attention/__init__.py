"""Refined attention, knowing nothing of models: the equations, the ways of computing them, and the choice.

    reference.py   the paper's equations            norms.py       batch norm in fp32, counted once a step
    composed.py    the plain composition            parameters.py  what a refiner is made of
    lean.py        without the expanded maps        folding.py     norms folded for inference
    fused/         the same in Triton kernels       choose.py      attend, refine, plain: what models call

Lean is built of tiles.py and moments.py, and a file for each case that lean.py lists; bottleneck_algebra.py and
bottleneck_function.py are shared with fused.
"""

from refiner_ds.attention.choose import WAYS, attend, plain, refine, set_keep, using, way_chosen
from refiner_ds.attention.composed import make_map, refined_map
from refiner_ds.attention.folding import fold_refiner
from refiner_ds.attention.norms import BatchNorm, Norm, batch_norm, frozen_statistics, recompute_aware
from refiner_ds.attention.parameters import (
    CONSTRAINTS,
    BottleneckRefiner,
    FoldedRefiner,
    LinearRefiner,
    LocalKernels,
    Refiner,
    Scores,
    kernel_shapes,
)

__all__ = [
    "CONSTRAINTS",
    "WAYS",
    "BatchNorm",
    "BottleneckRefiner",
    "FoldedRefiner",
    "LinearRefiner",
    "LocalKernels",
    "Norm",
    "Refiner",
    "Scores",
    "attend",
    "batch_norm",
    "fold_refiner",
    "frozen_statistics",
    "kernel_shapes",
    "make_map",
    "plain",
    "recompute_aware",
    "refine",
    "refined_map",
    "set_keep",
    "using",
    "way_chosen",
]
