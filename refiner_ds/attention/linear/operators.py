"""The paper's refiner as an operator.

Axes: B batch, H heads, E expanded maps, M maps that multiply values, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.operators import computed_by, empty_maps, operator, refuse_second_derivative
from refiner_ds.attention.weights import DeferredMap

__all__ = ["refine_linear"]

_ARGUMENTS = (
    "str backend, float scale, Tensor value, Tensor kernel, Tensor? expand, Tensor? reduce, Tensor[] source,"
    " Tensor? mask"
)


@operator("refine_linear", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _refine(
    backend: str, scale: float, value_BHNd: Tensor, kernel: Tensor, expand_EH: Tensor | None,
    reduce_HE: Tensor | None, source: list[Tensor], mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Refined maps times values, and row log-sum-exps (empty for tiles, and for a map)."""
    if backend == "triton":
        triton = computed_by("linear", "triton")
        out_BMNd, lse_BHN = triton.refined_values(scale, value_BHNd, kernel, source, mask_BN)
        return out_BMNd, _no_lse(source) if lse_BHN is None else lse_BHN
    tiled = computed_by("linear", "tiled")
    steps = tiled.Steps(kernel, expand_EH, reduce_HE)
    return tiled.refined_values(scale, value_BHNd, steps, source, mask_BN), _no_lse(source)


@_refine.register_fake
def _(
    backend: str, scale: float, value_BHNd: Tensor, kernel: Tensor, expand_EH: Tensor | None,
    reduce_HE: Tensor | None, source: list[Tensor], mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, tokens, width = value_BHNd.shape
    maps_out = len(kernel if reduce_HE is None else reduce_HE)
    if backend == "triton":
        out_BMNd = value_BHNd.new_empty(batch, tokens, maps_out, width).transpose(1, 2)
    else:
        out_BMNd = value_BHNd.new_empty(batch, maps_out, tokens, width)
    if backend == "triton" and len(source) > 1:
        return out_BMNd, source[0].new_empty(source[0].shape[:3], dtype=statistics_dtype(source[0].dtype))
    return out_BMNd, _no_lse(source)


@operator("refine_linear_backward", f"(Tensor grad, {_ARGUMENTS}, Tensor lse) -> Tensor[]")
def _refine_backward(
    grad_BMNd: Tensor, backend: str, scale: float, value_BHNd: Tensor, kernel: Tensor, expand_EH: Tensor | None,
    reduce_HE: Tensor | None, source: list[Tensor], mask_BN: Tensor | None, lse_BHN: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of value, kernel, expansion and reduction if there are any, and of the map or queries and keys."""
    found: list[Tensor | None]
    if backend == "triton":
        triton = computed_by("linear", "triton")
        d_value_BHNd, d_kernel, *d_source = triton.gradients(
            grad_BMNd, scale, value_BHNd, kernel, source, lse_BHN, mask_BN
        )
        found = [d_value_BHNd, d_kernel, None, None, *d_source]
    else:
        tiled = computed_by("linear", "tiled")
        steps = tiled.Steps(kernel, expand_EH, reduce_HE)
        found = tiled.gradients(grad_BMNd, scale, value_BHNd, steps, source, mask_BN)
    inputs = (value_BHNd, kernel, expand_EH, reduce_HE, *source)
    pairs = [(grad, like) for grad, like in zip(found, inputs, strict=True) if like is not None and grad is not None]
    weights = range(1, len(pairs) - len(source))
    grads = [grad.to(like.dtype) for grad, like in pairs]
    return [grad.contiguous() if index in weights else grad for index, grad in enumerate(grads)]


@_refine_backward.register_fake
def _(
    grad_BMNd: Tensor, backend: str, scale: float, value_BHNd: Tensor, kernel: Tensor, expand_EH: Tensor | None,
    reduce_HE: Tensor | None, source: list[Tensor], mask_BN: Tensor | None, lse_BHN: Tensor,
) -> list[Tensor]:  # fmt: skip
    weights = [x.new_empty(x.shape) for x in (kernel, expand_EH, reduce_HE) if x is not None]
    if backend != "triton":
        return [torch.empty_like(value_BHNd), *weights, *(torch.empty_like(x) for x in source)]
    batch, heads, tokens, width = value_BHNd.shape
    transposed_BHNd = value_BHNd.new_empty(batch, tokens, heads, width).transpose(1, 2)
    if len(source) > 1:
        return [transposed_BHNd, *weights, *(x.new_empty(x.shape) for x in source)]
    d_map_BHNN = empty_maps(backend, source[0], dtype=_map_gradient_dtype(grad_BMNd, value_BHNd))
    return [transposed_BHNd, *weights, d_map_BHNN.to(source[0].dtype)]


def _map_gradient_dtype(grad_BMNd: Tensor, value_BHNd: Tensor) -> torch.dtype:
    from refiner_ds.attention.linear.triton_backward import takes_one_launch

    return value_BHNd.dtype if takes_one_launch(grad_BMNd.shape[1], value_BHNd) else statistics_dtype(value_BHNd.dtype)


def _no_lse(source: list[Tensor]) -> Tensor:
    return source[0].new_empty(0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend, ctx.scale, value_BHNd, kernel, expand_EH, reduce_HE, source, mask_BN = inputs
    ctx.save_for_backward(value_BHNd, kernel, expand_EH, reduce_HE, *source, mask_BN, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BMNd: Tensor | None, unused: Tensor | None) -> tuple[Any, ...]:
    value_BHNd, kernel, expand_EH, reduce_HE, *source, mask_BN, lse_BHN = ctx.saved_tensors
    if grad_BMNd is None:
        return *(None,) * 6, [None] * len(source), None
    inputs = value_BHNd, kernel, expand_EH, reduce_HE, source, mask_BN
    found = iter(_refine_backward(grad_BMNd, ctx.backend, ctx.scale, *inputs, lse_BHN))
    weights = [None if x is None else next(found) for x in (value_BHNd, kernel, expand_EH, reduce_HE)]
    return None, None, *weights, list(found), None


_refine.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(_refine_backward)


def refine_linear(
    backend: str,
    attn: Tensor | DeferredMap,
    value_BHNd: Tensor,
    kernel: Tensor,
    expand_EH: Tensor | None = None,
    reduce_HE: Tensor | None = None,
) -> Tensor:
    """Refined maps times values, [B, M, N, d] in the values' dtype; maps without dropout.

    Args:
        backend: "tiled" or "triton".
        attn: the maps, or the queries and keys they are made of.
        kernel: one for each map, or dense [M, H, k, k], the only kind for kernels; the factor on refined maps included.
        expand_EH, reduce_HE: ``None`` where there is no such step.
    """
    source = [attn.q_BHNd, attn.k_BHNd] if isinstance(attn, DeferredMap) else [attn]
    scale, mask_BN = (attn.scale, attn.mask_BN) if isinstance(attn, DeferredMap) else (1.0, None)
    return _refine(backend, scale, value_BHNd, kernel, expand_EH, reduce_HE, source, mask_BN)[0]
