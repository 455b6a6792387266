"""Making an attention map, and making it and multiplying values with it, as operators.

Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.operators import computed_by, empty_maps, operator, refuse_second_derivative
from refiner_ds.attention.weights import DeferredMap

__all__ = ["attend", "make_map"]

_NUMBERS = "float scale, float dropout, int seed, Tensor? mask"


def _empty_lse(backend: str, q_BHNd: Tensor) -> Tensor:
    """Kernels save each row's log-sum-exp, tiles nothing."""
    if backend == "triton":
        return q_BHNd.new_empty(q_BHNd.shape[:3], dtype=statistics_dtype(q_BHNd.dtype))
    return q_BHNd.new_empty(0, dtype=torch.float32)


@operator("make_map", f"(str backend, Tensor q, Tensor k, Tensor? residual, {_NUMBERS}) -> (Tensor, Tensor)")
def _make_map(
    backend: str,
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    residual_BHNN: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The map, and row log-sum-exps (empty for tiles)."""
    if backend == "triton":
        from refiner_ds.attention.map import triton_kernels

        return triton_kernels.softmax_map(q_BHNd, k_BHNd, scale, residual_BHNN, dropout, seed, mask_BN)
    tiled = computed_by("map", "tiled")
    return tiled.softmax_map(q_BHNd, k_BHNd, residual_BHNN, scale, dropout, seed, mask_BN), _empty_lse(backend, q_BHNd)


@_make_map.register_fake
def _(
    backend: str,
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    residual_BHNN: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return empty_maps(backend, q_BHNd), _empty_lse(backend, q_BHNd)


@operator(
    "make_map_backward",
    f"(Tensor grad, str backend, Tensor q, Tensor k, Tensor lse, ScalarType? residual, {_NUMBERS}) -> Tensor[]",
)
def _make_map_backward(
    grad_BHNN: Tensor, backend: str, q_BHNd: Tensor, k_BHNd: Tensor, lse_BHN: Tensor, residual: torch.dtype | None,
    scale: float, dropout: float, seed: int, mask_BN: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, and the residual map if its dtype is given."""
    if backend == "triton":
        from refiner_ds.attention.map import triton_kernels

        found = triton_kernels.score_gradients(
            q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, residual, dropout, seed, mask_BN=mask_BN
        )
    else:
        tiled = computed_by("map", "tiled")
        found = tiled.map_gradients(grad_BHNN, q_BHNd, k_BHNd, residual, scale, dropout, seed, mask_BN)
    return [grad for grad in found if grad is not None]


@_make_map_backward.register_fake
def _(
    grad_BHNN: Tensor, backend: str, q_BHNd: Tensor, k_BHNd: Tensor, lse_BHN: Tensor, residual: torch.dtype | None,
    scale: float, dropout: float, seed: int, mask_BN: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    if backend == "triton":
        found = [q_BHNd.new_empty(q_BHNd.shape), k_BHNd.new_empty(k_BHNd.shape)]
        return found if residual is None else [*found, empty_maps(backend, q_BHNd, dtype=residual)]
    found = [torch.empty_like(q_BHNd), torch.empty_like(k_BHNd)]
    return found if residual is None else [*found, torch.empty_like(grad_BHNN, dtype=residual)]


def _map_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend, q_BHNd, k_BHNd, residual_BHNN, *ctx.numbers, mask_BN = inputs
    ctx.residual = None if residual_BHNN is None else residual_BHNN.dtype
    ctx.save_for_backward(q_BHNd, k_BHNd, output[1], mask_BN)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _map_backward(ctx: Any, grad_BHNN: Tensor | None, unused: Tensor | None) -> tuple[Any, ...]:
    if grad_BHNN is None:
        return (None,) * 8
    *saved, mask_BN = ctx.saved_tensors
    grads = _make_map_backward(grad_BHNN, ctx.backend, *saved, ctx.residual, *ctx.numbers, mask_BN)
    return None, grads[0], grads[1], grads[2] if len(grads) > 2 else None, None, None, None, None


_make_map.register_autograd(_map_backward, setup_context=_map_setup)
refuse_second_derivative(_make_map_backward)


def make_map(backend: str, deferred: DeferredMap, residual_BHNN: Tensor | None, seed: int) -> Tensor:
    """softmax(scale·QKᵀ) + scale·residual, with dropout drawn from ``seed``, [B, H, N, N] in the queries' dtype."""
    q_BHNd, k_BHNd, scale, dropout, mask_BN = deferred
    return _make_map(backend, q_BHNd, k_BHNd, residual_BHNN, scale, dropout, seed, mask_BN)[0]


@operator("attend", f"(Tensor q, Tensor k, Tensor value, Tensor? residual, {_NUMBERS}) -> (Tensor, Tensor, Tensor)")
def _attend(
    q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor, residual_BHNN: Tensor | None, scale: float, dropout: float,
    seed: int, mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Map times values, the map, and row log-sum-exps, by kernels."""
    from refiner_ds.attention.map import triton_kernels

    map_BHNN, lse_BHN = triton_kernels.softmax_map(q_BHNd, k_BHNd, scale, residual_BHNN, dropout, seed, mask_BN)
    return map_BHNN @ value_BHNd, map_BHNN, lse_BHN


@_attend.register_fake
def _(
    q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor, residual_BHNN: Tensor | None, scale: float, dropout: float,
    seed: int, mask_BN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse_BHN = _empty_lse("triton", q_BHNd)
    return value_BHNd.new_empty(value_BHNd.shape), empty_maps("triton", q_BHNd), lse_BHN


@operator(
    "attend_backward",
    "(Tensor? grad, Tensor? map_grad, Tensor q, Tensor k, Tensor value, Tensor lse, Tensor map, ScalarType? residual,"
    f" {_NUMBERS}) -> Tensor[]",
)
def _attend_backward(
    grad_BHNd: Tensor | None, grad_BHNN: Tensor | None, q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor,
    lse_BHN: Tensor, map_BHNN: Tensor, residual: torch.dtype | None, scale: float, dropout: float, seed: int,
    mask_BN: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q and k, of the values if the output has one, and of the residual map if its dtype is given."""
    from refiner_ds.attention.map import triton_kernels

    attended = None if grad_BHNd is None else (grad_BHNd, value_BHNd)
    dq_BHNd, dk_BHNd, d_residual_BHNN = triton_kernels.score_gradients(
        q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, residual, dropout, seed, attended, mask_BN
    )
    d_value_BHNd = None if grad_BHNd is None else map_BHNN.mT @ grad_BHNd
    return [grad for grad in (dq_BHNd, dk_BHNd, d_value_BHNd, d_residual_BHNN) if grad is not None]


@_attend_backward.register_fake
def _(
    grad_BHNd: Tensor | None, grad_BHNN: Tensor | None, q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor,
    lse_BHN: Tensor, map_BHNN: Tensor, residual: torch.dtype | None, scale: float, dropout: float, seed: int,
    mask_BN: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    found = [x.new_empty(x.shape) for x in (q_BHNd, k_BHNd, value_BHNd)][: 2 if grad_BHNd is None else 3]
    return found if residual is None else [*found, empty_maps("triton", q_BHNd, dtype=residual)]


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q_BHNd, k_BHNd, value_BHNd, residual_BHNN, *ctx.numbers, mask_BN = inputs
    ctx.residual = None if residual_BHNN is None else residual_BHNN.dtype
    ctx.save_for_backward(q_BHNd, k_BHNd, value_BHNd, output[2], output[1], mask_BN)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _attend_autograd(
    ctx: Any, grad_BHNd: Tensor | None, grad_BHNN: Tensor | None, unused: Tensor | None
) -> tuple[Any, ...]:
    if grad_BHNd is None and grad_BHNN is None:
        return (None,) * 8
    *saved, mask_BN = ctx.saved_tensors
    found = iter(_attend_backward(grad_BHNd, grad_BHNN, *saved, ctx.residual, *ctx.numbers, mask_BN))
    d_value_BHNd: Tensor | None
    dq_BHNd, dk_BHNd = next(found), next(found)
    d_value_BHNd = None if grad_BHNd is None else next(found)
    return dq_BHNd, dk_BHNd, d_value_BHNd, next(found, None), None, None, None, None


_attend.register_autograd(_attend_autograd, setup_context=_attend_setup)
refuse_second_derivative(_attend_backward)


def attend(deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Map times values, [B, H, N, d], and the map, by kernels; values like queries in shape and dtype."""
    q_BHNd, k_BHNd, scale, dropout, mask_BN = deferred
    out_BHNd, map_BHNN, _ = _attend(q_BHNd, k_BHNd, value_BHNd, residual_BHNN, scale, dropout, seed, mask_BN)
    return out_BHNd, map_BHNN
