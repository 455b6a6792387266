"""Refined attention, knowing nothing of models: the equations, the ways of computing them, and the choice.

    equations.py   the paper's equations            norms.py       batch norm in fp32, counted once a step
    eager.py    the plain composition            parameters.py  what a refiner is made of
    lean.py        without the expanded maps        folding.py     norms folded for inference
    fused/         the same in Triton kernels       choose.py      attend, refine, plain: what models call

Lean is built of tiles.py and moments.py, and a file for each case that lean.py lists; bottleneck_algebra.py and
bottleneck_function.py are shared with fused.
"""

from refiner_ds.attention.dispatch import (
    BACKENDS,
    attend,
    attention_backend,
    plain_attention,
    refine,
    resolve_backend,
    set_save_for_backward,
)
from refiner_ds.attention.eager import make_map, refined_map
from refiner_ds.attention.folding import fold_refiner, running_affine, scaled
from refiner_ds.attention.norms import BatchNorm, Norm, batch_norm, frozen_statistics, recompute_aware
from refiner_ds.attention.weights import (
    CONSTRAINTS,
    BottleneckWeights,
    DeferredMap,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    RefinerWeights,
    kernel_shapes,
)

__all__ = [
    "CONSTRAINTS",
    "BACKENDS",
    "BatchNorm",
    "BottleneckWeights",
    "FoldedWeights",
    "LinearWeights",
    "LocalKernels",
    "Norm",
    "RefinerWeights",
    "DeferredMap",
    "attend",
    "attention_backend",
    "batch_norm",
    "fold_refiner",
    "frozen_statistics",
    "kernel_shapes",
    "make_map",
    "plain_attention",
    "recompute_aware",
    "refine",
    "refined_map",
    "set_save_for_backward",
    "resolve_backend",
    "running_affine",
    "scaled",
]
