"""Refined attention, knowing nothing of models.

    dispatch.py    attend, refine, plain_attention: what models call; the choice of a backend
    weights.py     the arguments          refiners.py   a row for each kind of refiner
    equations.py   the paper's, with which tests compare    norms.py   batch norm in fp32, counted once a step
    moments.py     its mean and variance, from those of parts
    choice.py      which backend is the fastest here: counted, then timed      live_bytes.py   memory, on fake tensors
    compiling.py   where torch.compile keeps its code                                      flops.py   of the operators
    backends/      eager, eager compiled, tiled, triton, and the check of kernels before they become the default

By operation, with every backend's implementation side by side:

    map/   linear/   bottleneck/        built of   tiling/ (tiles of query rows)   kernels/ (Triton)
"""

# Whoever loads an exported program finds the operators registered, whoever counts FLOPs their formulas.
import refiner_ds.attention.flops  # noqa: F401
from refiner_ds.attention.backends.eager import refined_map
from refiner_ds.attention.bottleneck.folding import fold_refiner, running_affine, scaled
from refiner_ds.attention.dispatch import (
    BACKENDS,
    attend,
    attention_backend,
    choose_backend,
    compiles_eager,
    describe_backend,
    is_traced,
    kernels_verified,
    kind_of,
    plain_attention,
    refine,
    resolve_backend,
    set_save_for_backward,
    use_backends,
)
from refiner_ds.attention.first_order import first_order, is_transformed
from refiner_ds.attention.map.eager import make_map
from refiner_ds.attention.norms import BatchNorm, Norm, batch_norm, frozen_statistics, recompute_aware
from refiner_ds.attention.refiners import REFINERS, Refiner
from refiner_ds.attention.weights import (
    CONSTRAINTS,
    BottleneckWeights,
    Case,
    DeferredMap,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    RefinerWeights,
    expanded_maps,
    kernel_shapes,
)

__all__ = [
    "BACKENDS",
    "CONSTRAINTS",
    "REFINERS",
    "BatchNorm",
    "BottleneckWeights",
    "Case",
    "DeferredMap",
    "FoldedWeights",
    "LinearWeights",
    "LocalKernels",
    "Norm",
    "Refiner",
    "RefinerWeights",
    "attend",
    "attention_backend",
    "choose_backend",
    "batch_norm",
    "compiles_eager",
    "describe_backend",
    "expanded_maps",
    "first_order",
    "fold_refiner",
    "frozen_statistics",
    "is_traced",
    "is_transformed",
    "kernels_verified",
    "kind_of",
    "kernel_shapes",
    "make_map",
    "plain_attention",
    "recompute_aware",
    "refine",
    "refined_map",
    "resolve_backend",
    "running_affine",
    "scaled",
    "set_save_for_backward",
    "use_backends",
]
