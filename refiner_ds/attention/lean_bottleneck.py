"""The released refiner in training as one autograd function that keeps the map, or the map and two stacks.

    bottleneck_forward.py   four passes over tiles       bottleneck_backward.py   four passes back

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refiner_ds.attention.bottleneck_backward import gradients
from refiner_ds.attention.bottleneck_forward import Layer, Statistics
from refiner_ds.attention.norms import Norm
from refiner_ds.attention.parameters import BottleneckRefiner, LocalKernels

__all__ = ["refine_in_training"]


class _Refine(torch.autograd.Function):
    """(map, value, weights …) to refined map times value."""

    @staticmethod
    def forward(
        ctx: Any, layout: BottleneckRefiner, scale: float, keep: str, map_BHNN: Tensor, value_BHNd: Tensor,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(map_BHNN.device.type, enabled=False):
            layer = Layer(map_BHNN, layout, scale)
            statistics, *stacks = layer.measure()
            out_BHNd = layer.output(stacks[1], value_BHNd)
        kept = stacks if keep == "stacks" else []
        ctx.save_for_backward(map_BHNN, value_BHNd, *weights, *statistics, *kept)
        ctx.layout, ctx.scale, ctx.weights = layout, scale, len(weights)
        return out_BHNd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHNd: Tensor) -> tuple[Tensor | None, ...]:
        map_BHNN, value_BHNd, *rest = ctx.saved_tensors
        weights, rest = rest[: ctx.weights], rest[ctx.weights :]
        statistics, stacks = Statistics(*rest[:6]), rest[6:]
        with torch.autocast(map_BHNN.device.type, enabled=False):
            layer = Layer(map_BHNN, _joined(ctx.layout, weights), ctx.scale)
            layer.fold(statistics)
            local_BNNE, narrow_BHNN = stacks or (layer.local_maps(), None)
            narrow_BHNN = layer.narrow_maps(local_BNNE) if narrow_BHNN is None else narrow_BHNN
            grads = gradients(layer, statistics, local_BNNE, narrow_BHNN, value_BHNd, grad_BHNd)
        inputs = (map_BHNN, value_BHNd, *weights)
        return None, None, None, *(grad.to(like.dtype) for grad, like in zip(grads, inputs, strict=True))


def _parted(refiner: BottleneckRefiner) -> tuple[BottleneckRefiner, tuple[Tensor, ...]]:
    """The refiner's differentiable tensors by themselves, so that autograd sees and keeps them."""
    norms = [refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H]
    affines = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return refiner, (refiner.expand_EH, refiner.local.kernels[0], refiner.project_HE, *affines)


def _joined(layout: BottleneckRefiner, weights: list[Tensor]) -> BottleneckRefiner:
    """The refiner again, of saved tensors."""
    expand_EH, kernel_E1kk, project_HE, *affines = weights
    norms: list[Norm] = [
        norm._replace(weight=affines[2 * index], bias=affines[2 * index + 1])
        for index, norm in enumerate((layout.norm1_E, layout.norm2_E, layout.norm3_H, layout.adapt_H))
    ]
    local = LocalKernels((kernel_E1kk,), layout.local.constraint, layout.local.grid)
    return BottleneckRefiner(expand_EH, norms[0], local, norms[1], project_HE, norms[2], norms[3])


def refine_in_training(
    map_BHNN: Tensor, value_BHNd: Tensor, refiner: BottleneckRefiner, scale: float, keep: str
) -> Tensor:
    """Refined maps times values with batch statistics, [B, H, N, d]; constraint "none" only.

    Args:
        keep: "map" keeps the map alone for backward, "stacks" also h2 and h3, four times and more its bytes.
    """
    layout, weights = _parted(refiner)
    return _Refine.apply(layout, scale, keep, map_BHNN, value_BHNd, *weights)
