"""One function for each thing a block does with maps, and the choice of how it is computed.

    attend   q, k, v (+ the residual map) ──> A·V and A       a block that makes a map
    refine   A, or q and k, and v ──> refined A·V              a block that refines one
    plain    q, k, v ──> A·V                                   a block of a plain ViT

REFINER_ATTENTION, or ``way``, names the way; without either it is "triton" on a GPU and "tiled" elsewhere. What fused
does not know is computed leanly, and what lean does not know (lean.py lists it) is composed plainly. Lean keeps a
quarter to a fiftieth of the plain composition's bytes. Its time on CPU, as a ratio to the plain composition (12 heads
of 32, r = 3, training, ``python -m refiner_ds.benchmark attention``):

    tokens               50       197      577
    bottleneck fp32      1.0-1.1  0.3-0.4  0.3
    bottleneck bf16      1.4-1.7  1.0-1.1  0.5
    linear fp32          0.9      0.3-0.4  0.2
    linear bf16          0.9-1.1  0.6-0.7  0.2

Batches of 8, of 4 at 577 tokens; docs/benchmarks.md has more. The choice does not follow the cells above 1: bf16
autocast on CPU with few tokens is rare, memory is what these models lack, and "eager" is there for who has it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import eager, equations, lean
from refiner_ds.attention.weights import DeferredMap, RefinerWeights

__all__ = [
    "BACKENDS",
    "attend",
    "attention_backend",
    "plain_attention",
    "refine",
    "resolve_backend",
    "set_save_for_backward",
]

BACKENDS = {
    "eager": "the plain composition, every map written out",
    "tiled": "tiles, no expanded map kept",
    "triton": "Triton kernels on a GPU, the same saved for backward as tiled",
}

_save_for_backward = "auto"


@cache
def _kernels() -> ModuleType | None:
    """The way "triton", where Triton is installed; imported when first asked for, as it takes a while."""
    if find_spec("triton") is None:
        return None
    from refiner_ds.attention.fused import backends

    return backends


@cache
def _trusted(device: torch.device) -> bool:
    """Whether kernels are chosen without having been asked for: on a GPU where they give what lean gives."""
    if device.type != "cuda" or (kernels := _kernels()) is None:
        return False
    from refiner_ds.attention.fused import trial

    if (fault := trial.fault(kernels, device)) is not None:
        warnings.warn(
            f"refined attention is computed by the tiled backend on {device}: its Triton kernels {fault}", stacklevel=2
        )
    return fault is None


def resolve_backend(backend: str | None = None, device: torch.device | None = None) -> str:
    """The way that will be used: ``way``, else REFINER_ATTENTION, else what is fastest on the device.

    Args:
        way: a key of :data:`BACKENDS`, or ``None``.
        device: where the tensors are; ``None`` asks for the CPU.
    Raises:
        ValueError: no way has that name, or the device cannot run it.
    """
    device = device or torch.device("cpu")
    name = backend or os.environ.get("REFINER_ATTENTION", "") or ("triton" if _trusted(device) else "tiled")
    if name not in BACKENDS:
        raise ValueError(f"REFINER_ATTENTION is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name == "triton" and ((kernels := _kernels()) is None or not kernels.runs_on(device)):
        wanted = "which needs Triton and a GPU"
        raise ValueError(f"REFINER_ATTENTION is 'triton', {wanted}; on {device} it must be tiled or eager")
    return name


@contextmanager
def attention_backend(backend: str) -> Iterator[None]:
    """Inside, REFINER_ATTENTION is ``way``."""
    before = os.environ.get("REFINER_ATTENTION")
    os.environ["REFINER_ATTENTION"] = backend
    try:
        yield
    finally:
        os.environ.pop("REFINER_ATTENTION")
        if before is not None:
            os.environ["REFINER_ATTENTION"] = before


def _takers(backend: str | None, device: torch.device) -> list[ModuleType]:
    """Who is asked to compute, in turn; the plain composition knows everything, what compilers trace included."""
    if lean.traced():
        return []
    name = resolve_backend(backend, device)
    if name == "triton":
        kernels = _kernels()
        assert kernels is not None
        return [kernels, lean]
    return [lean] if name == "tiled" else []


def set_save_for_backward(save_for_backward: str) -> None:
    """What bottlenecks keep for backward from now on, in this process.

    Args:
        save_for_backward: "map" (the map alone, recomputed from), "activations" (the inputs of two norms too, 5 times
            the bytes and less work), or "auto", which looks at the memory of the device.
    Raises:
        ValueError: any other word.
    """
    global _save_for_backward
    if save_for_backward not in lean.SAVE_FOR_BACKWARD:
        raise ValueError(
            f"save_for_backward is {save_for_backward!r}; it must be one of {', '.join(lean.SAVE_FOR_BACKWARD)}"
        )
    _save_for_backward = save_for_backward


def attend(
    scores: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Make the map of a block, with what the block before handed on, and multiply the values with it.

    Args:
        scores: queries and keys, their scale and dropout.
        value_BHNd: values.
        residual_BHNN: the map of the block before, added scale times; ``None`` in the first block.
        way: how to compute it; ``None`` leaves the choice to REFINER_ATTENTION and to what is leanest.
    Returns:
        [B, H, N, d], and the map [B, H, N, N] to hand on, both in the values' dtype.
    Raises:
        ValueError: no way has that name.
    """
    taker = next((taker for taker in _takers(backend, value_BHNd.device) if taker.knows_maps(scores)), None)
    if taker:
        return taker.attend(scores, value_BHNd, residual_BHNN)
    map_BHNN = eager.make_map(scores, residual_BHNN).to(value_BHNd.dtype)
    return equations.attend(map_BHNN, value_BHNd), map_BHNN


def refine(
    attn: Tensor | DeferredMap,
    value_BHNd: Tensor,
    refiner: RefinerWeights,
    scale: float = 1.0,
    backend: str | None = None,
    save_for_backward: str | None = None,
) -> Tensor:
    """Refine attention maps and multiply the values with them.

    Args:
        attn: the maps, [B, H, N, N], or the queries and keys they come from.
        value_BHNd: values.
        refiner: kind and weights; norms in training mode have their running statistics updated here, once.
        scale: factor on the refined maps (a :class:`FoldedWeights` holds it already).
        way: how to compute it; ``None`` leaves the choice to REFINER_ATTENTION and to what is leanest.
        keep: what a bottleneck keeps for backward, see :func:`set_save_for_backward`; ``None`` is what was set there.
    Returns:
        [B, H, N, d] in the values' dtype; [B, E, N, d] where the refiner does not reduce.
    Raises:
        ValueError: no way, or nothing to keep, has that name.
    """
    # The view gathers the refiner's own gradients of the map before those of its other users, so that the sum is
    # rounded in the same order whether or not the refiner is recomputed by itself.
    attn = attn if isinstance(attn, DeferredMap) else attn.view_as(attn).to(value_BHNd.dtype)
    for taker in _takers(backend, value_BHNd.device):
        if taker.knows(attn, value_BHNd, refiner):
            return taker.refine(attn, value_BHNd, refiner, scale, save_for_backward or _save_for_backward)
    map_BHNN = eager.make_map(attn).to(value_BHNd.dtype) if isinstance(attn, DeferredMap) else attn
    return eager.refine(map_BHNN, value_BHNd, refiner, scale)[0]


def plain_attention(scores: DeferredMap, value_BHNd: Tensor) -> Tensor:
    """Softmax attention without a refiner, by PyTorch's fused kernels, [B, H, N, d]."""
    return F.scaled_dot_product_attention(
        scores.q_BHNd, scores.k_BHNd, value_BHNd, dropout_p=scores.dropout, scale=scores.scale
    )
