"""The released refiner in training as one autograd function that saves the map, or the map and two activations.

    norm_algebra.py    the four norms, folded and differentiated by hand
    Passes             four passes over the maps forward and four backward: tiled_*.py or triton_passes.py

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck.norm_algebra import Affine, NormAlgebra, Statistics
from refiner_ds.attention.first_order import first_order
from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import BottleneckWeights, LocalKernels

__all__ = ["Passes", "refine_in_training"]

Moments = tuple[Tensor, Tensor]


class Passes(Protocol):
    """The passes over the maps of one refinement. Sums and moments are those of the whole batch, in float64.

    The activations h2 and h3 are in the map's dtype; h2 in whichever memory layout the backend likes.
    """

    def __init__(self, map_BHNN: Tensor, algebra: NormAlgebra) -> None: ...

    def map_moments(self) -> Moments:
        """Forward 1: mean and covariance of A over heads, [H] and [H, H]."""

    def expand_local(self) -> tuple[Tensor, Moments]:
        """Forward 2: h2, and its mean and variance, [E] each."""

    def reduce(self, local_BENN: Tensor) -> tuple[Tensor, Moments]:
        """Forward 3: h3, and its mean [H] and the covariance of (h3, A) within each head, [2, 2, H]."""

    def output(self, reduced_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Forward 4: refined maps times values, [B, H, N, d]."""

    def recompute(self) -> tuple[Tensor, Tensor]:
        """h2 and h3 again, in backward."""

    def bwd_output(
        self, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward 1: ∂V, and the sums of ∂T, ∂T·(h3 − μ3) and ∂T·(A − μ), [H] each."""

    def bwd_reduce(self, to_reduced: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 2: ∂reduce, and the sums of m2 and m2·(h2 − μ2), [E] each; m2 is the gradient after norm 2."""

    def bwd_expand_local(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 3: ∂kernel, the sum of m1 [E], and m1·(A − μ)ᵀ [E, H]; m1 is the gradient after norm 1."""

    def bwd_map_statistics(self, gain_HH: Tensor, level_H: Tensor) -> Tensor:
        """Backward 4: ∂A, [B, H, N, N]."""


def _forward(passes: Passes, algebra: NormAlgebra) -> tuple[Statistics, Tensor, Tensor]:
    """The batch's statistics, after the running ones are updated with them, and the activations h2 and h3."""
    moments = passes.map_moments()
    algebra.fold_norm1(*moments)
    local_BENN, moments2 = passes.expand_local()
    algebra.fold_norm2(*moments2)
    reduced_BHNN, moments3 = passes.reduce(local_BENN)
    algebra.fold_norms34(*moments3)
    statistics = Statistics(*moments, *moments2, *moments3)
    algebra.update_running(statistics)
    return statistics, local_BENN, reduced_BHNN


def _backward(
    passes: Passes, algebra: NormAlgebra, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
) -> list[Tensor]:
    """Gradients of map, value, expansion, kernel, reduction, and weight and bias of the four norms, in this order."""
    d_value_BHNd, *sums = passes.bwd_output(activations, value_BHNd, grad_BHNd)
    d_reduce_HE, q0_E, q1_E = passes.bwd_reduce(*algebra.backward_norms34(*sums))
    d_kernel_E1kk, p0_E, cross_EH = passes.bwd_expand_local(*algebra.backward_norm2(q0_E, q1_E))
    d_map_BHNN = passes.bwd_map_statistics(*algebra.backward_norm1(p0_E, cross_EH))
    weights = algebra.d_expand_EH, d_kernel_E1kk, d_reduce_HE
    return [d_map_BHNN, d_value_BHNd, *weights, *algebra.norm_gradients()]


class _Refine(torch.autograd.Function):
    """(map, value, tensors of the weights …) to refined map times value."""

    @staticmethod
    def forward(
        ctx: Any, passes: type[Passes], layout: BottleneckWeights, scale: float, save_for_backward: str,
        map_BHNN: Tensor, value_BHNd: Tensor, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(map_BHNN.device.type, enabled=False):
            algebra = NormAlgebra(layout, scale, _count(map_BHNN))
            over = passes(map_BHNN, algebra)
            statistics, *activations = _forward(over, algebra)
            out_BHNd = over.output(activations[1], value_BHNd)
        saved = activations if save_for_backward == "activations" else []
        ctx.save_for_backward(map_BHNN, value_BHNd, *tensors, *statistics, *saved)
        ctx.passes, ctx.layout, ctx.scale, ctx.tensors = passes, layout, scale, len(tensors)
        return out_BHNd

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_BHNd: Tensor) -> tuple[Tensor | None, ...]:
        map_BHNN, value_BHNd, *rest = ctx.saved_tensors
        tensors, rest = rest[: ctx.tensors], rest[ctx.tensors :]
        statistics, saved = Statistics(*rest[: len(Statistics._fields)]), rest[len(Statistics._fields) :]
        with torch.autocast(map_BHNN.device.type, enabled=False):
            algebra = NormAlgebra(_with_tensors(ctx.layout, tensors), ctx.scale, _count(map_BHNN))
            algebra.fold(statistics)
            over = ctx.passes(map_BHNN, algebra)
            activations = (saved[0], saved[1]) if saved else over.recompute()
            grads = _backward(over, algebra, activations, value_BHNd, grad_BHNd)
        inputs = (map_BHNN, value_BHNd, *tensors)
        return None, None, None, None, *(grad.to(like.dtype) for grad, like in zip(grads, inputs, strict=True))


def _count(map_BHNN: Tensor) -> int:
    """Entries of each head's map over the batch."""
    return map_BHNN.numel() // map_BHNN.shape[1]


def _tensors(weights: BottleneckWeights) -> tuple[Tensor, ...]:
    """The differentiable tensors by themselves, so that autograd sees and saves them."""
    norms = [weights.norm1_E, weights.norm2_E, weights.norm3_H, weights.adapt_H]
    affines = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return (weights.expand_EH, weights.local.kernels[0], weights.reduce_HE, *affines)


def _with_tensors(layout: BottleneckWeights, tensors: list[Tensor]) -> BottleneckWeights:
    """The weights with these tensors, in the order of :func:`_tensors`, instead of their own."""
    expand_EH, kernel_E1kk, reduce_HE, *affines = tensors
    norms: list[Norm] = [
        norm._replace(weight=affines[2 * index], bias=affines[2 * index + 1])
        for index, norm in enumerate((layout.norm1_E, layout.norm2_E, layout.norm3_H, layout.adapt_H))
    ]
    local = LocalKernels((kernel_E1kk,), layout.local.constraint, layout.local.grid)
    return BottleneckWeights(expand_EH, norms[0], local, norms[1], reduce_HE, norms[2], norms[3])


def refine_in_training(
    map_BHNN: Tensor,
    value_BHNd: Tensor,
    weights: BottleneckWeights,
    scale: float,
    save_for_backward: str,
    passes: type[Passes],
) -> Tensor:
    """Refined maps times values with batch statistics, [B, H, N, d]; constraint "none" only.

    Args:
        map_BHNN, value_BHNd: in one dtype.
        weights: with every norm in training mode; their running statistics are updated.
        scale: factor on the refined maps.
        save_for_backward: "map" saves the map alone, "activations" also h2 and h3, four times its bytes and more.
        passes: the backend's.
    """
    return _Refine.apply(passes, weights, scale, save_for_backward, map_BHNN, value_BHNd, *_tensors(weights))
