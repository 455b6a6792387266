"""One function for each thing a block does with maps, and the choice of how it is computed.

    attend   q, k, v (+ the map handed on) ──> A·V and A       a block that makes a map
    refine   A, or q and k, and v ──> refined A·V              a block that refines one
    plain    q, k, v ──> A·V                                   a block of a plain ViT

REFINER_ATTENTION, or ``way``, names the way; without either it is "fused" on a GPU and "lean" elsewhere. What fused
does not know is computed leanly, and what lean does not know (lean.py lists it) is composed plainly. Lean keeps a
quarter to a fiftieth of the plain composition's bytes. Its time on CPU, as a ratio to the plain composition (12 heads
of 32, r = 3, training, ``python -m refiner_ds.benchmark attention``):

    tokens               50       197      577
    bottleneck fp32      1.0-1.1  0.3-0.4  0.3
    bottleneck bf16      1.4-1.7  1.0-1.1  0.5
    linear fp32          0.9      0.3-0.4  0.2
    linear bf16          0.9-1.1  0.6-0.7  0.2

Batches of 8, of 4 at 577 tokens; docs/benchmarks.md has more. The choice does not follow the cells above 1: bf16
autocast on CPU with few tokens is rare, memory is what these models lack, and "reference" is there for who has it.
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

from refiner_ds.attention import composed, lean, reference
from refiner_ds.attention.parameters import Refiner, Scores

__all__ = ["WAYS", "attend", "plain", "refine", "set_keep", "using", "way_chosen"]

WAYS = {
    "reference": "the plain composition, every map written out",
    "lean": "tiles, no expanded map kept",
    "fused": "Triton kernels on a GPU, maps kept as in lean",
}

_keep = "auto"


@cache
def _kernels() -> ModuleType | None:
    """The way "fused", where Triton is installed; imported when first asked for, as it takes a while."""
    if find_spec("triton") is None:
        return None
    from refiner_ds.attention.fused import ways

    return ways


@cache
def _trusted(device: torch.device) -> bool:
    """Whether kernels are chosen without having been asked for: on a GPU where they give what lean gives."""
    if device.type != "cuda" or (kernels := _kernels()) is None:
        return False
    from refiner_ds.attention.fused import trial

    if (fault := trial.fault(kernels, device)) is not None:
        warnings.warn(f"refined attention is computed leanly on {device}: its fused kernels {fault}", stacklevel=2)
    return fault is None


def way_chosen(way: str | None = None, device: torch.device | None = None) -> str:
    """The way that will be used: ``way``, else REFINER_ATTENTION, else what is fastest on the device.

    Args:
        way: a key of :data:`WAYS`, or ``None``.
        device: where the tensors are; ``None`` asks for the CPU.
    Raises:
        ValueError: no way has that name, or the device cannot run it.
    """
    device = device or torch.device("cpu")
    name = way or os.environ.get("REFINER_ATTENTION", "") or ("fused" if _trusted(device) else "lean")
    if name not in WAYS:
        raise ValueError(f"REFINER_ATTENTION is {name!r}; it must be one of {', '.join(WAYS)}")
    if name == "fused" and ((kernels := _kernels()) is None or not kernels.runs_on(device)):
        wanted = "which needs Triton and a GPU"
        raise ValueError(f"REFINER_ATTENTION is 'fused', {wanted}; on {device} it must be lean or reference")
    return name


@contextmanager
def using(way: str) -> Iterator[None]:
    """Inside, REFINER_ATTENTION is ``way``."""
    before = os.environ.get("REFINER_ATTENTION")
    os.environ["REFINER_ATTENTION"] = way
    try:
        yield
    finally:
        os.environ.pop("REFINER_ATTENTION")
        if before is not None:
            os.environ["REFINER_ATTENTION"] = before


def _takers(way: str | None, device: torch.device) -> list[ModuleType]:
    """Who is asked to compute, in turn; the plain composition knows everything, what compilers trace included."""
    if lean.traced():
        return []
    name = way_chosen(way, device)
    if name == "fused":
        kernels = _kernels()
        assert kernels is not None
        return [kernels, lean]
    return [lean] if name == "lean" else []


def set_keep(keep: str) -> None:
    """What bottlenecks keep for backward from now on, in this process.

    Args:
        keep: "map" (the map alone, recomputed from), "stacks" (also two stacks of maps before their activations, five
            times the bytes and less work), or "auto", which looks at the memory of the device.
    Raises:
        ValueError: any other word.
    """
    global _keep
    if keep not in lean.KEEPS:
        raise ValueError(f"keep is {keep!r}; it must be one of {', '.join(lean.KEEPS)}")
    _keep = keep


def attend(
    scores: Scores, value_BHNd: Tensor, handed_BHNN: Tensor | None = None, way: str | None = None
) -> tuple[Tensor, Tensor]:
    """Make the map of a block, with what the block before handed on, and multiply the values with it.

    Args:
        scores: queries and keys, their scale and dropout.
        value_BHNd: values.
        handed_BHNN: the map of the block before, added scale times; ``None`` in the first block.
        way: how to compute it; ``None`` leaves the choice to REFINER_ATTENTION and to what is leanest.
    Returns:
        [B, H, N, d], and the map [B, H, N, N] to hand on, both in the values' dtype.
    Raises:
        ValueError: no way has that name.
    """
    taker = next((taker for taker in _takers(way, value_BHNd.device) if taker.knows_maps(scores)), None)
    if taker:
        return taker.attend(scores, value_BHNd, handed_BHNN)
    map_BHNN = composed.make_map(scores, handed_BHNN).to(value_BHNd.dtype)
    return reference.attend(map_BHNN, value_BHNd), map_BHNN


def refine(
    attn: Tensor | Scores,
    value_BHNd: Tensor,
    refiner: Refiner,
    scale: float = 1.0,
    way: str | None = None,
    keep: str | None = None,
) -> Tensor:
    """Refine attention maps and multiply the values with them.

    Args:
        attn: the maps, [B, H, N, N], or the queries and keys they come from.
        value_BHNd: values.
        refiner: kind and weights; norms in training mode have their running statistics updated here, once.
        scale: factor on the refined maps (a :class:`FoldedRefiner` holds it already).
        way: how to compute it; ``None`` leaves the choice to REFINER_ATTENTION and to what is leanest.
        keep: what a bottleneck keeps for backward, see :func:`set_keep`; ``None`` is what was set there.
    Returns:
        [B, H, N, d] in the values' dtype; [B, E, N, d] where the refiner does not reduce.
    Raises:
        ValueError: no way, or nothing to keep, has that name.
    """
    # The view gathers the refiner's own gradients of the map before those of its other users, so that the sum is
    # rounded in the same order whether or not the refiner is recomputed by itself.
    attn = attn if isinstance(attn, Scores) else attn.view_as(attn).to(value_BHNd.dtype)
    for taker in _takers(way, value_BHNd.device):
        if taker.knows(attn, value_BHNd, refiner):
            return taker.refine(attn, value_BHNd, refiner, scale, keep or _keep)
    map_BHNN = composed.make_map(attn).to(value_BHNd.dtype) if isinstance(attn, Scores) else attn
    return composed.refine(map_BHNN, value_BHNd, refiner, scale)[0]


def plain(scores: Scores, value_BHNd: Tensor) -> Tensor:
    """Softmax attention without a refiner, by PyTorch's fused kernels, [B, H, N, d]."""
    return F.scaled_dot_product_attention(
        scores.q_BHNd, scores.k_BHNd, value_BHNd, dropout_p=scores.dropout, scale=scores.scale
    )
