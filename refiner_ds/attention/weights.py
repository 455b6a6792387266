"""The arguments of ``attention.refine`` as named tuples of tensors.

    DeferredMap        queries and keys, in place of the map they make
    LinearWeights      expand ─ local ─ reduce                                             the paper's
    BottleneckWeights  expand ─ norm ─ local ─ norm ─ reduce ─ norm (+ identity) ─ norm    the released models'
    FoldedWeights      the latter for inference, its four norms folded into weights and biases

Axes: B batch, H heads, E expanded maps, N tokens (class token first), d head width, h×w the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refiner_ds.attention.norms import Norm

__all__ = [
    "CONSTRAINTS",
    "BottleneckWeights",
    "Case",
    "DeferredMap",
    "FoldedWeights",
    "LinearWeights",
    "LocalKernels",
    "RefinerWeights",
    "expanded_maps",
    "kernel_shapes",
]

CONSTRAINTS = ("none", "spatial", "row+col")


class DeferredMap(NamedTuple):
    """An attention map that has not been computed yet: softmax(scale · Q Kᵀ), then dropout.

    Args:
        q_BHNd, k_BHNd: queries and keys, [B, H, N, d].
        scale: what the logits are multiplied with, 1/√d.
        dropout: probability of dropping an entry of the map; 0 outside training.
        mask_BN: which tokens are real, [B, N] bool, where sequences are padded to one length: rows and columns of the
            others are zero. ``None`` where all are.
    """

    q_BHNd: Tensor
    k_BHNd: Tensor
    scale: float
    dropout: float = 0.0
    mask_BN: Tensor | None = None


class LocalKernels(NamedTuple):
    """The kernels of distributed local attention, one set for each map.

    Args:
        kernels: for constraint "none" one [E, 1, k, k] over the (query, key) plane; for "spatial" two [E, 1, k, k],
            over the patch grid of the keys and of the queries; for "row+col" four, [E, 1, 1, k] and [E, 1, k, 1]
            along the rows and columns of the keys' grid, then of the queries'.
        constraint: one of :data:`CONSTRAINTS`.
        grid: rows and columns of the patch grid; tokens beyond rows·columns come first and are class tokens.
    """

    kernels: tuple[Tensor, ...]
    constraint: str
    grid: tuple[int, int]


class LinearWeights(NamedTuple):
    """The paper's refiner (sections 3.2 and 3.3): expansion, distributed local attention, reduction.

    Args:
        expand_EH: [E, H], or ``None`` for local attention on the heads' own maps (then E = H).
        local: the kernels.
        reduce_HE: [H, E], or ``None``: every r expanded maps in turn then multiply one head's values.
    """

    expand_EH: Tensor | None
    local: LocalKernels
    reduce_HE: Tensor | None


class BottleneckWeights(NamedTuple):
    """The released models' refiner: an inverted bottleneck with an identity, and a norm after the sum.

    Args:
        expand_EH, reduce_HE: the 1×1 convolutions, [E, H] and [H, E].
        local: the depthwise kernels between them.
        norm1_E, norm2_E, norm3_H: after each of the three; ReLU6 follows the first two.
        adapt_H: the norm after the sum with the identity.
    """

    expand_EH: Tensor
    norm1_E: Norm
    local: LocalKernels
    norm2_E: Norm
    reduce_HE: Tensor
    norm3_H: Norm
    adapt_H: Norm


class FoldedWeights(NamedTuple):
    """A :class:`BottleneckWeights` with running statistics, every norm folded into its neighbour.

    The refined map is reduce·relu6(gain2·local(relu6(expand·A + bias1)) + bias2) + gain·A + shift.

    Args:
        expand_EH, bias1_E, bias2_E, reduce_HE: weights and biases, [E, H], [E], [E], [H, E].
        local: the depthwise kernels, with the second norm's gain in them where the constraint is "none".
        gain2_E: that gain where class tokens bypass the kernels, [E]; otherwise ``None``.
        gain_H, shift_H: what the identity is multiplied with, and the constant, [H].
    """

    expand_EH: Tensor
    bias1_E: Tensor
    local: LocalKernels
    gain2_E: Tensor | None
    bias2_E: Tensor
    reduce_HE: Tensor
    gain_H: Tensor
    shift_H: Tensor


# A named tuple of a type that ``refiners.REFINERS`` has a row for.
RefinerWeights = tuple[Any, ...]


class Case(NamedTuple):
    """A call of the operator, about which backends are asked whether they support it.

    Args:
        attn: the maps, [B, H, N, N], or the queries and keys that they are made of.
        value_BHNd: values.
        weights: of the refiner; ``None`` where a map is made and multiplies the values unrefined.
        mask_BN: which tokens are real; maps and values of the others are zero already.
    """

    attn: Tensor | DeferredMap
    value_BHNd: Tensor
    weights: RefinerWeights | None = None
    mask_BN: Tensor | None = None

    def wants_gradients(self) -> bool:
        """Whether autograd would record this call."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(self))


def _tensors(part: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from _tensors(inner)


def kernel_shapes(constraint: str, kernel_size: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the kernels of a constraint, in the order in which :class:`LocalKernels` takes them.

    Raises:
        ValueError: the constraint is unknown, or the kernel size is even or not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd, such as 1, 3 or 5")
    square, row, column = (kernel_size, kernel_size), (1, kernel_size), (kernel_size, 1)
    shapes = {
        "none": {"plane": square},
        "spatial": {"keys": square, "queries": square},
        "row+col": {"key_rows": row, "key_columns": column, "query_rows": row, "query_columns": column},
    }
    if constraint not in shapes:
        raise ValueError(f"constraint is {constraint!r}; it must be one of {', '.join(CONSTRAINTS)}")
    return shapes[constraint]


def expanded_maps(num_heads: int, expansion_ratio: float) -> int:
    """How many maps expansion makes of ``num_heads``.

    Raises:
        ValueError: the ratio is below 1, or makes no whole number of maps.
    """
    if expansion_ratio < 1:
        raise ValueError(f"expansion_ratio is {expansion_ratio}; it must be 1 or more")
    if (maps := num_heads * expansion_ratio) != int(maps):
        raise ValueError(f"expansion_ratio {expansion_ratio} makes {maps:g} maps of {num_heads} heads, no whole number")
    return int(maps)
