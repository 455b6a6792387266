"""The released refiner as operators: in training with the statistics of its norms, and folded for inference.

In training the map is saved for backward, or the map and two activations; the batch's statistics are outputs, and the
running ones are updated outside.

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck.norm_algebra import NormAlgebra, Statistics
from refiner_ds.attention.bottleneck.passes import backward_passes, forward_passes, passes_of
from refiner_ds.attention.masking import real_entries
from refiner_ds.attention.norms import Norm, update_running
from refiner_ds.attention.operators import empty_maps, operator, refuse_second_derivative
from refiner_ds.attention.weights import BottleneckWeights, FoldedWeights, LocalKernels

__all__ = ["refine_folded", "refine_in_training"]

STATISTICS = len(Statistics._fields)
_ARGUMENTS = (
    "str backend, float scale, float[] eps, Tensor map, Tensor value, Tensor expand, Tensor kernel, Tensor reduce,"
    " Tensor[] affines, Tensor? mask"
)


@operator("refine_bottleneck", f"({_ARGUMENTS}, bool save_activations) -> ({', '.join(['Tensor'] * 13)})")
def _refine(
    backend: str, scale: float, eps: list[float], map_BHNN: Tensor, value_BHNd: Tensor, expand_EH: Tensor,
    kernel_E1kk: Tensor, reduce_HE: Tensor, affines: list[Tensor], mask_BN: Tensor | None,
    save_activations: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, h2 and h3 (empty unless saved), the fields of Statistics, and mean and variance of norms 1 and 4."""
    weights = _weights(eps, [expand_EH, kernel_E1kk, reduce_HE, *affines])
    with torch.autocast(map_BHNN.device.type, enabled=False):
        algebra = NormAlgebra(weights, scale, _count(map_BHNN, mask_BN))
        passes = passes_of(backend)(map_BHNN, algebra, mask_BN)
        statistics, local_BENN, reduced_BHNN = forward_passes(passes, algebra)
        out_BHNd = passes.output(reduced_BHNN, value_BHNd)
    activations = (local_BENN, reduced_BHNN) if save_activations else (map_BHNN.new_empty(0), map_BHNN.new_empty(0))
    small = (*statistics, *algebra.moments1, *algebra.moments4)
    return out_BHNd, *activations, *(x.clone() for x in small)


@_refine.register_fake
def _(
    backend: str, scale: float, eps: list[float], map_BHNN: Tensor, value_BHNd: Tensor, expand_EH: Tensor,
    kernel_E1kk: Tensor, reduce_HE: Tensor, affines: list[Tensor], mask_BN: Tensor | None,
    save_activations: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    heads, expanded = reduce_HE.shape
    activations = [map_BHNN.new_empty(0), map_BHNN.new_empty(0)]
    if save_activations:
        activations = [_empty_expanded(backend, map_BHNN, expanded), empty_maps(backend, map_BHNN)]
    shapes = (heads,), (heads, heads), (expanded,), (expanded,), (heads,), (2, 2, heads)
    small = (*shapes, (expanded,), (expanded,), (heads,), (heads,))
    out_BHNd = value_BHNd.new_empty(value_BHNd.shape)
    return out_BHNd, *activations, *(map_BHNN.new_empty(shape, dtype=torch.float64) for shape in small)


@operator(
    "refine_bottleneck_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor[] statistics, Tensor[] activations) -> Tensor[]",
)
def _refine_backward(
    grad_BHNd: Tensor, backend: str, scale: float, eps: list[float], map_BHNN: Tensor, value_BHNd: Tensor,
    expand_EH: Tensor, kernel_E1kk: Tensor, reduce_HE: Tensor, affines: list[Tensor], mask_BN: Tensor | None,
    statistics: list[Tensor],    activations: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of map, value, expansion, kernel, reduction, and weight and bias of the four norms."""
    tensors = [expand_EH, kernel_E1kk, reduce_HE, *affines]
    with torch.autocast(map_BHNN.device.type, enabled=False):
        algebra = NormAlgebra(_weights(eps, tensors), scale, _count(map_BHNN, mask_BN))
        algebra.fold(Statistics(*statistics))
        passes = passes_of(backend)(map_BHNN, algebra, mask_BN)
        saved = (activations[0], activations[1]) if activations else passes.recompute()
        d_map_BHNN, d_value_BHNd, *rest = backward_passes(passes, algebra, saved, value_BHNd, grad_BHNd)
    small = [grad.to(like.dtype).contiguous() for grad, like in zip(rest, tensors, strict=True)]
    return [d_map_BHNN.to(map_BHNN.dtype), d_value_BHNd.to(value_BHNd.dtype), *(_own(x) for x in small)]


@_refine_backward.register_fake
def _(
    grad_BHNd: Tensor, backend: str, scale: float, eps: list[float], map_BHNN: Tensor, value_BHNd: Tensor,
    expand_EH: Tensor, kernel_E1kk: Tensor, reduce_HE: Tensor, affines: list[Tensor], mask_BN: Tensor | None,
    statistics: list[Tensor],    activations: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    like_map = empty_maps(backend, map_BHNN) if backend == "triton" else torch.empty_like(map_BHNN)
    like_value = value_BHNd.new_empty(value_BHNd.shape) if backend == "triton" else torch.empty_like(value_BHNd)
    small = [expand_EH, kernel_E1kk, reduce_HE, *affines]
    return [like_map, like_value, *(x.new_empty(x.shape) for x in small)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, ctx.scale, ctx.eps, map_BHNN, value_BHNd, *weights, affines, mask_BN, save_activations = inputs
    activations = output[1:3] if save_activations else ()
    ctx.save_for_backward(map_BHNN, value_BHNd, *weights, *affines, mask_BN, *output[3 : 3 + STATISTICS], *activations)
    ctx.affines = len(affines)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BHNd: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_BHNd is None:
        return *(None,) * 8, [None] * ctx.affines, None, None
    inputs = list(ctx.saved_tensors)
    first, last = 6 + ctx.affines, 6 + ctx.affines + STATISTICS
    d_map_BHNN, d_value_BHNd, d_expand_EH, d_kernel_E1kk, d_reduce_HE, *d_affines = _refine_backward(
        grad_BHNd,
        ctx.backend,
        ctx.scale,
        ctx.eps,
        *inputs[:5],
        inputs[5 : first - 1],
        inputs[first - 1],
        inputs[first:last],
        inputs[last:],
    )
    gradients = d_map_BHNN, d_value_BHNd, d_expand_EH, d_kernel_E1kk, d_reduce_HE, d_affines
    return None, None, None, *gradients, None, None


_refine.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(_refine_backward)


def refine_in_training(
    backend: str, map_BHNN: Tensor, value_BHNd: Tensor, weights: BottleneckWeights, scale: float,
    save_activations: bool, mask_BN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Refined maps times values with batch statistics, [B, H, N, d]; constraint "none" only.

    Args:
        backend: "tiled" or "triton".
        map_BHNN, value_BHNd: in one dtype.
        weights: with every norm in training mode; their running statistics are updated.
        scale: factor on the refined maps.
        save_activations: save h2 and h3 for backward as well as the map, four times its bytes and more.
        mask_BN: which tokens are real; maps and values of the others are zero, and the output of their rows any number.
    """
    norms = [weights.norm1_E, weights.norm2_E, weights.norm3_H, weights.adapt_H]
    affines = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    out_BHNd, _, _, *small = _refine(
        backend, scale, [norm.eps for norm in norms], map_BHNN, value_BHNd, weights.expand_EH,
        weights.local.kernels[0], weights.reduce_HE, affines, mask_BN, save_activations,
    )  # fmt: skip
    _, _, mean2_E, variance2_E, mean3_H, joint_22H, mean1_E, variance1_E, mean4_H, variance4_H = small
    moments = (mean1_E, variance1_E), (mean2_E, variance2_E), (mean3_H, joint_22H[0, 0]), (mean4_H, variance4_H)
    for norm, (mean_C, variance_C) in zip(norms, moments, strict=True):
        update_running(norm, mean_C, variance_C, _count(map_BHNN, mask_BN))
    return out_BHNd


@operator(
    "refine_folded",
    "(str backend, Tensor map, Tensor value, Tensor expand, Tensor bias1, Tensor kernel, Tensor bias2, Tensor reduce,"
    " Tensor gain, Tensor shift, Tensor? mask) -> Tensor",
)
def _folded(
    backend: str, map_BHNN: Tensor, value_BHNd: Tensor, expand_EH: Tensor, bias1_E: Tensor, kernel_E1kk: Tensor,
    bias2_E: Tensor, reduce_HE: Tensor, gain_H: Tensor, shift_H: Tensor, mask_BN: Tensor | None,
) -> Tensor:  # fmt: skip
    """Refined maps times values, [B, H, N, d], with the norms folded."""
    local = LocalKernels((kernel_E1kk,), "none", (1, 1))
    weights = FoldedWeights(expand_EH, bias1_E, local, None, bias2_E, reduce_HE, gain_H, shift_H)
    if backend == "triton":
        from refiner_ds.attention.bottleneck import triton_inference

        return triton_inference.refine_folded(map_BHNN, value_BHNd, weights, mask_BN)
    from refiner_ds.attention.bottleneck import tiled_inference

    return tiled_inference.refine_folded(map_BHNN, value_BHNd, weights, mask_BN)


@_folded.register_fake
def _(
    backend: str, map_BHNN: Tensor, value_BHNd: Tensor, expand_EH: Tensor, bias1_E: Tensor, kernel_E1kk: Tensor,
    bias2_E: Tensor, reduce_HE: Tensor, gain_H: Tensor, shift_H: Tensor, mask_BN: Tensor | None,
) -> Tensor:  # fmt: skip
    return value_BHNd.new_empty(value_BHNd.shape)


def refine_folded(
    backend: str, map_BHNN: Tensor, value_BHNd: Tensor, weights: FoldedWeights, mask_BN: Tensor | None = None
) -> Tensor:
    """Refined maps times values, [B, H, N, d], with the norms folded; constraint "none" only, nothing for backward."""
    parts = weights.expand_EH, weights.bias1_E, weights.local.kernels[0], weights.bias2_E, weights.reduce_HE
    return _folded(backend, map_BHNN, value_BHNd, *parts, weights.gain_H, weights.shift_H, mask_BN)


def _weights(eps: list[float], tensors: list[Tensor]) -> BottleneckWeights:
    """The weights of differentiable tensors alone; running statistics are not an operator's."""
    expand_EH, kernel_E1kk, reduce_HE, *affines = tensors
    pairs = zip(affines[::2], affines[1::2], eps, strict=True)
    norms = [Norm(weight, bias, bias, weight, None, True, one) for weight, bias, one in pairs]
    local = LocalKernels((kernel_E1kk,), "none", (1, 1))
    return BottleneckWeights(expand_EH, norms[0], local, norms[1], reduce_HE, norms[2], norms[3])


def _empty_expanded(backend: str, map_BHNN: Tensor, expanded: int) -> Tensor:
    if backend == "triton":
        return empty_maps(backend, map_BHNN, expanded)
    batch, _, tokens, _ = map_BHNN.shape
    return map_BHNN.new_empty(batch, tokens, tokens, expanded).permute(0, 3, 1, 2)


def _own(x: Tensor) -> Tensor:
    """A tensor with a storage of its own: an operator's outputs must not share any."""
    return x.clone() if x._is_view() or x.untyped_storage().nbytes() != x.numel() * x.element_size() else x


def _count(map_BHNN: Tensor, mask_BN: Tensor | None) -> int | Tensor:
    """Real entries of each head's map over the batch; under a mask a tensor, for which no GPU is waited."""
    if mask_BN is not None:
        return real_entries(mask_BN)
    return map_BHNN.shape[0] * map_BHNN.shape[2] * map_BHNN.shape[3]
