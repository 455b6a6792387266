"""The way "tiled": which cases it knows, and what computes each. No expanded map is kept, or ever whole.

    BottleneckWeights in training                  bottleneck_*.py       keeps A, and two stacks if told to
    LinearWeights                                  lean_linear.py        keeps q, k and v, or A and v
    FoldedWeights, BottleneckWeights evaluating    lean_inference.py     keeps nothing
    a freshly made map                             lean_map.py           keeps q and k

The plain composition knows the rest: kernels over the patch grid, gradients of a bottleneck in evaluation, norms of
which some train and some do not, and whatever torch.compile and exporters trace.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.attention import lean_map
from refiner_ds.attention.bottleneck_backward import TiledPasses
from refiner_ds.attention.bottleneck_function import Passes, refine_in_training
from refiner_ds.attention.folding import fold_refiner
from refiner_ds.attention.lean_inference import refine_folded
from refiner_ds.attention.lean_linear import refine_linear
from refiner_ds.attention.lean_map import make_map
from refiner_ds.attention.weights import (
    BottleneckWeights,
    DeferredMap,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    RefinerWeights,
)

__all__ = [
    "SAVE_FOR_BACKWARD",
    "Makers",
    "attend",
    "knows",
    "knows_maps",
    "make_map",
    "refine",
    "refine_by",
    "resolve_save_for_backward",
    "traced",
]

SAVE_FOR_BACKWARD = ("auto", "map", "activations")

# A network has up to this many bottlenecks at once in a forward pass, and their stacks may take a quarter of memory.
STACKS_SHARE = 1 / (4 * 16)


def traced() -> bool:
    """Whether a compiler or an exporter is tracing: they are shown the plain composition."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def knows_maps(scores: DeferredMap) -> bool:
    """Whether making this map can be lean."""
    return not traced()


def attend(scores: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``attention.attend``: the output [B, H, N, d], and the map [B, H, N, N] in the values' dtype."""
    map_BHNN = make_map(scores, residual_BHNN).to(value_BHNd.dtype)
    return lean_map.attend(map_BHNN, value_BHNd), map_BHNN


def knows(attn: Tensor | DeferredMap, value_BHNd: Tensor, refiner: RefinerWeights) -> bool:
    """Whether :func:`refine` computes this case."""
    if traced() or refiner.local.constraint != "none":
        return False
    if isinstance(refiner, LinearWeights):
        return True
    if isinstance(refiner, BottleneckWeights):
        modes = {norm.training for norm in (refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H)}
        if modes == {True}:
            return True
        if len(modes) == 2:
            return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(attn, value_BHNd, *refiner)))


def _tensors(*parts: object) -> list[Tensor]:
    """Every tensor in these, and in the named tuples among them."""
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, LocalKernels):
            found += part.kernels
        elif isinstance(part, tuple):
            found += _tensors(*part)
    return found


def resolve_save_for_backward(save_for_backward: str, map_BHNN: Tensor, expanded: int) -> str:
    """What a bottleneck keeps: ``keep`` itself, or for "auto" the faster stacks wherever memory is plentiful.

    Stacks are kept where those of one layer take at most 1/64 of the device's memory, so that a network's take at
    most a quarter.

    Raises:
        ValueError: ``keep`` is none of :data:`SAVE_FOR_BACKWARD`.
    """
    if save_for_backward not in SAVE_FOR_BACKWARD:
        raise ValueError(
            f"save_for_backward is {save_for_backward!r}; it must be one of {', '.join(SAVE_FOR_BACKWARD)}"
        )
    if save_for_backward != "auto":
        return save_for_backward
    heads = map_BHNN.shape[1]
    stacks_bytes = map_BHNN.numel() * map_BHNN.element_size() * (heads + expanded) // heads
    return "activations" if stacks_bytes <= STACKS_SHARE * _memory_bytes(map_BHNN.device) else "map"


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Makers(NamedTuple):
    """What computes each case of a way; see the head of this file."""

    make_map: Callable[[DeferredMap], Tensor]
    linear: Callable[[Tensor | DeferredMap, Tensor, LinearWeights, float], Tensor]
    folded: Callable[[Tensor, Tensor, FoldedWeights], Tensor]
    passes: type[Passes]


def refine_by(
    makers: Makers,
    attn: Tensor | DeferredMap,
    value_BHNd: Tensor,
    refiner: RefinerWeights,
    scale: float,
    save_for_backward: str,
) -> Tensor:
    """Refined maps times values, [B, M, N, d], by the one of ``makers`` whose case it is.

    Args:
        attn, value_BHNd, refiner, scale: as ``attention.refine`` takes them.
        keep: one of :data:`SAVE_FOR_BACKWARD`; only a bottleneck in training has the choice.
    """
    if isinstance(refiner, LinearWeights):
        return makers.linear(attn, value_BHNd, refiner, scale)
    map_BHNN = (makers.make_map(attn) if isinstance(attn, DeferredMap) else attn).to(value_BHNd.dtype)
    if isinstance(refiner, FoldedWeights):
        return makers.folded(map_BHNN, value_BHNd, refiner)
    if not refiner.norm1_E.training:
        return makers.folded(map_BHNN, value_BHNd, fold_refiner(refiner, scale))
    kept = resolve_save_for_backward(save_for_backward, map_BHNN, refiner.expand_EH.shape[0])
    return refine_in_training(map_BHNN, value_BHNd, refiner, scale, kept, makers.passes)


# ``attention.refine`` for what :func:`knows` says yes to: attn, value, refiner, scale, keep.
refine = partial(refine_by, Makers(make_map, refine_linear, refine_folded, TiledPasses))
