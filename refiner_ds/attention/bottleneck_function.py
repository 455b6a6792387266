"""The released refiner in training as one autograd function that keeps the map, or the map and two stacks.

    bottleneck_algebra.py    the four norms, folded and differentiated by hand
    Passes                   four passes over the maps forward and four back: bottleneck_forward.py and _backward.py

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refiner_ds.attention.bottleneck_algebra import Affine, Algebra, Statistics
from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import BottleneckWeights, LocalKernels

__all__ = ["Passes", "refine_in_training"]

Moments = tuple[Tensor, Tensor]


class Passes(Protocol):
    """The passes over the maps of one refinement. Sums and moments come in float64, of everything in the batch.

    The stacks are whoever makes the passes' own: h2 in any layout, h3 as [B, H, N, N], both in the map's dtype.
    """

    def __init__(self, map_BHNN: Tensor, algebra: Algebra) -> None: ...

    def map_moments(self) -> Moments:
        """Forward 1: mean and covariance of A over heads, [H] and [H, H]."""

    def local_maps(self, measure: bool) -> tuple[Tensor, Moments | None]:
        """Forward 2: h2, and if asked to its mean and variance, [E] each."""

    def narrow_maps(self, local: Tensor, measure: bool) -> tuple[Tensor, Moments | None]:
        """Forward 3: h3, and if asked to its mean [H] and the covariance of (h3, A) within each head, [2, 2, H]."""

    def output(self, narrow_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Forward 4: refined maps times values, [B, H, N, d]."""

    def last(self, stacks: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor) -> tuple[Tensor, ...]:
        """Backward 1: the gradient of the values, and sums of ∂T, ∂T·(h3 − μ3) and ∂T·(A − μ), [H] each."""

    def second(self, to_narrow: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 2: the gradient of the projection, and sums of m2 and m2·(h2 − μ2), [E] each."""

    def first(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 3: the gradient of the kernel, the sum p0 of m1 [E], and m1·(A − μ)ᵀ [E, H]."""

    def through_statistics(self, pull_HH: Tensor, level_H: Tensor) -> Tensor:
        """Backward 4: the gradient of the map, [B, H, N, N]."""


def _measure(passes: Passes, algebra: Algebra) -> tuple[Statistics, Tensor, Tensor]:
    """The batch's statistics, counted in the norms' running ones, and the stacks h2 and h3."""
    moments = passes.map_moments()
    algebra.first_norm(*moments)
    local, moments2 = passes.local_maps(measure=True)
    assert moments2 is not None
    algebra.second_norm(*moments2)
    narrow_BHNN, moments3 = passes.narrow_maps(local, measure=True)
    assert moments3 is not None
    algebra.last_norms(*moments3)
    statistics = Statistics(*moments, *moments2, *moments3)
    algebra.count_batch(statistics)
    return statistics, local, narrow_BHNN


def _gradients(
    passes: Passes, algebra: Algebra, stacks: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
) -> list[Tensor]:
    """Gradients of map, value, expansion, kernel, projection, and weight and bias of the four norms, in this order."""
    d_value_BHNd, *sums = passes.last(stacks, value_BHNd, grad_BHNd)
    d_project_HE, q0_E, q1_E = passes.second(*algebra.behind_last(*sums))
    d_kernel_E1kk, p0_E, through_EH = passes.first(*algebra.behind_second(q0_E, q1_E))
    d_map_BHNN = passes.through_statistics(*algebra.behind_first(p0_E, through_EH))
    weights = algebra.d_expand_EH, d_kernel_E1kk, d_project_HE
    return [d_map_BHNN, d_value_BHNd, *weights, *algebra.norm_gradients()]


class _Refine(torch.autograd.Function):
    """(map, value, weights …) to refined map times value."""

    @staticmethod
    def forward(
        ctx: Any, passes: type[Passes], layout: BottleneckWeights, scale: float, save_for_backward: str,
        map_BHNN: Tensor, value_BHNd: Tensor, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(map_BHNN.device.type, enabled=False):
            algebra = Algebra(layout, scale, _count(map_BHNN))
            made = passes(map_BHNN, algebra)
            statistics, *stacks = _measure(made, algebra)
            out_BHNd = made.output(stacks[1], value_BHNd)
        kept = stacks if save_for_backward == "activations" else []
        ctx.save_for_backward(map_BHNN, value_BHNd, *weights, *statistics, *kept)
        ctx.passes, ctx.layout, ctx.scale, ctx.weights = passes, layout, scale, len(weights)
        return out_BHNd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHNd: Tensor) -> tuple[Tensor | None, ...]:
        map_BHNN, value_BHNd, *rest = ctx.saved_tensors
        weights, rest = rest[: ctx.weights], rest[ctx.weights :]
        statistics, kept = Statistics(*rest[:6]), rest[6:]
        with torch.autocast(map_BHNN.device.type, enabled=False):
            algebra = Algebra(_joined(ctx.layout, weights), ctx.scale, _count(map_BHNN))
            algebra.fold(statistics)
            passes = ctx.passes(map_BHNN, algebra)
            if not kept:
                kept = [passes.local_maps(measure=False)[0]]
                kept.append(passes.narrow_maps(kept[0], measure=False)[0])
            grads = _gradients(passes, algebra, (kept[0], kept[1]), value_BHNd, grad_BHNd)
        inputs = (map_BHNN, value_BHNd, *weights)
        return None, None, None, None, *(grad.to(like.dtype) for grad, like in zip(grads, inputs, strict=True))


def _count(map_BHNN: Tensor) -> int:
    return map_BHNN.numel() // map_BHNN.shape[1]


def _parted(refiner: BottleneckWeights) -> tuple[BottleneckWeights, tuple[Tensor, ...]]:
    """The refiner's differentiable tensors by themselves, so that autograd sees and keeps them."""
    norms = [refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H]
    affines = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return refiner, (refiner.expand_EH, refiner.local.kernels[0], refiner.project_HE, *affines)


def _joined(layout: BottleneckWeights, weights: list[Tensor]) -> BottleneckWeights:
    """The refiner again, of saved tensors."""
    expand_EH, kernel_E1kk, project_HE, *affines = weights
    norms: list[Norm] = [
        norm._replace(weight=affines[2 * index], bias=affines[2 * index + 1])
        for index, norm in enumerate((layout.norm1_E, layout.norm2_E, layout.norm3_H, layout.adapt_H))
    ]
    local = LocalKernels((kernel_E1kk,), layout.local.constraint, layout.local.grid)
    return BottleneckWeights(expand_EH, norms[0], local, norms[1], project_HE, norms[2], norms[3])


def refine_in_training(
    map_BHNN: Tensor,
    value_BHNd: Tensor,
    refiner: BottleneckWeights,
    scale: float,
    save_for_backward: str,
    passes: type[Passes],
) -> Tensor:
    """Refined maps times values with batch statistics, [B, H, N, d]; constraint "none" only.

    Args:
        keep: "map" keeps the map alone for backward, "activations" also h2 and h3, four times and more its bytes.
        passes: who goes over the maps.
    """
    layout, weights = _parted(refiner)
    return _Refine.apply(passes, layout, scale, save_for_backward, map_BHNN, value_BHNd, *weights)
