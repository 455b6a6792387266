"""The paper's refiner as one convolution, tile by tile, keeping no map that it can make again.

    q, k ─ softmax ─> A ─ ∗ W ─> T ─ · V ─> out       W[o,i] = Σ_e reduce[o,e]·kernel[e]·expand[e,i], under autograd

The three linear steps compose to one small dense kernel, whose own gradient autograd carries on to the weights. By
arithmetic that pays from r = 3.3 on; by the clock (12 heads, 197 tokens, CPU, fp32) the three plain steps take three
quarters of its time at r = 1 and twice as long at r = 3. As it keeps the least, it is used at every r. From
queries and keys, q, k, v, each row's log-sum-exp and W are kept for backward; from a map, the map, v and W.
Axes: B batch, H heads, M maps that multiply values (E expanded without reduction), N tokens, d head width; b, R the
images and query rows of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refiner_ds.attention import reference
from refiner_ds.attention.lean_map import make_map, score_gradients, softmax_again, softmax_rows
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.parameters import LinearRefiner, Scores
from refiner_ds.attention.tiles import Tile, convolve, kernel_gradient, tiles

__all__ = ["one_kernel", "refine_linear"]


def one_kernel(refiner: LinearRefiner) -> tuple[Tensor, int]:
    """The whole refiner as one kernel over the (query, key) plane, and its groups; constraint "none" only.

    Returns:
        [M, H, k, k] and 1, or [H, 1, k, k] and H where nothing is expanded.
    """
    kernel_E1kk = _exactly(refiner.local.kernels[0])
    if refiner.expand_EH is None:
        return kernel_E1kk, kernel_E1kk.shape[0]
    expand_EH = _exactly(refiner.expand_EH)
    if refiner.reduce_HE is None:
        return kernel_E1kk * expand_EH[:, :, None, None], 1
    with torch.autocast(kernel_E1kk.device.type, enabled=False):
        return reference.compose_kernel(expand_EH, kernel_E1kk, _exactly(refiner.reduce_HE)), 1


def _exactly(weight: Tensor) -> Tensor:
    return weight.to(statistics_dtype(weight.dtype))


def _turned(kernel: Tensor, groups: int) -> Tensor:
    """The kernel that carries a gradient back through the convolution."""
    flipped = kernel.flip(-1, -2)
    return flipped if groups > 1 else flipped.transpose(0, 1).contiguous()


class _Refine(torch.autograd.Function):
    """(map) or (q, k), with value and kernel, to refined map times value."""

    @staticmethod
    def forward(ctx: Any, groups: int, scale: float, value_BHNd: Tensor, kernel: Tensor, *source: Tensor) -> Tensor:
        batch, heads, tokens, width = value_BHNd.shape
        maps_out, precision = kernel.shape[0], statistics_dtype(value_BHNd.dtype)
        out_BMNd = value_BHNd.new_empty(batch, maps_out, tokens, width)
        lse_BHN = value_BHNd.new_empty(batch, heads, tokens, dtype=precision) if len(source) == 2 else None
        exact = kernel.to(precision)
        with torch.autocast(value_BHNd.device.type, enabled=False):
            for tile in _cut(value_BHNd, kernel):
                if lse_BHN is None:
                    map_bHRN = source[0][tile.images, :, tile.reach].to(precision)
                else:
                    map_bHRN, lse_bHR = softmax_rows(source[0], source[1], scale, tile, tile.reach)
                    lse_BHN[tile.images, :, tile.reach] = lse_bHR
                refined_bMRN = convolve(map_bHRN, exact, tile, groups)
                value_bHNd = value_BHNd[tile.images].to(precision)
                out_BMNd[tile.images, :, tile.rows] = reference.attend(refined_bMRN, value_bHNd)
        ctx.save_for_backward(value_BHNd, kernel, *source, *(() if lse_BHN is None else (lse_BHN,)))
        ctx.groups, ctx.scale = groups, scale
        return out_BMNd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BMNd: Tensor) -> tuple[Tensor | None, ...]:
        value_BHNd, kernel, *source = ctx.saved_tensors
        with torch.autocast(value_BHNd.device.type, enabled=False):
            grads = _gradients(grad_BMNd, value_BHNd, kernel, source, ctx.groups, ctx.scale)
        inputs = (value_BHNd, kernel, *source[:2])
        return None, None, *(grad.to(like.dtype) for grad, like in zip(grads, inputs, strict=True))


def _cut(value_BHNd: Tensor, kernel: Tensor) -> list[Tile]:
    """Tiles for the maps that go in or come out, whichever are more."""
    batch, heads, tokens, _ = value_BHNd.shape
    return list(tiles(batch, tokens, max(heads, kernel.shape[0]), value_BHNd.device, kernel.shape[-1] // 2))


def _gradients(
    grad_BMNd: Tensor, value_BHNd: Tensor, kernel: Tensor, source: list[Tensor], groups: int, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of value and kernel, then of the map, or of queries and keys, whose log-sum-exps come last."""
    precision, heads = statistics_dtype(value_BHNd.dtype), value_BHNd.shape[1]
    d_value_BHNd = torch.zeros_like(value_BHNd, dtype=precision)
    d_kernel = torch.zeros_like(kernel, dtype=torch.float64)
    d_source = [torch.zeros_like(x, dtype=precision if len(source) > 1 else x.dtype) for x in source[:2]]
    exact = kernel.to(precision)
    back, shares = _turned(exact, groups), kernel.shape[0] // heads
    for tile in _cut(value_BHNd, kernel):
        if len(source) == 1:
            map_bHRN = source[0][tile.images, :, tile.reach].to(precision)
        else:
            map_bHRN = softmax_again(source[0], source[1], source[2], scale, tile, tile.reach)
        value_bMNd = value_BHNd[tile.images].to(precision).repeat_interleave(shares, 1)
        reach_bMRd = grad_BMNd[tile.images, :, tile.reach].to(precision)
        grad_bMRd = reach_bMRd[:, :, tile.inner]
        d_refined_bMRN = reach_bMRd @ value_bMNd.mT
        d_value_bMNd = convolve(map_bHRN, exact, tile, groups).mT @ grad_bMRd
        d_value_BHNd[tile.images] += d_value_bMNd.unflatten(1, (heads, shares)).sum(2)
        inner_bMRN = d_refined_bMRN[:, :, tile.inner]
        d_kernel += kernel_gradient(map_bHRN, inner_bMRN, exact, tile, groups)
        d_map_bHRN = convolve(d_refined_bMRN, back, tile, groups)
        if len(source) == 1:
            d_source[0][tile.images, :, tile.rows] = d_map_bHRN
            continue
        q_BHNd, k_BHNd, _ = source
        dq_bHRd, dk_bHNd = score_gradients(map_bHRN[:, :, tile.inner], d_map_bHRN, q_BHNd, k_BHNd, scale, tile)
        d_source[0][tile.images, :, tile.rows] = dq_bHRd
        d_source[1][tile.images] += dk_bHNd
    return d_value_BHNd, d_kernel, *d_source


def refine_linear(attn: Tensor | Scores, value_BHNd: Tensor, refiner: LinearRefiner, scale: float) -> Tensor:
    """Refined maps times values, [B, M, N, d]; constraint "none" only.

    With dropout the map is made first and kept: tiles overlap by the kernel's reach, and an entry must be dropped in
    all of them or in none.
    """
    kernel, groups = one_kernel(refiner)
    if isinstance(attn, Scores) and attn.dropout:
        attn = make_map(attn).to(value_BHNd.dtype)
    if isinstance(attn, Scores):
        return _Refine.apply(groups, attn.scale, value_BHNd, kernel * scale, attn.q_BHNd, attn.k_BHNd)
    return _Refine.apply(groups, 1.0, value_BHNd, kernel * scale, attn)
