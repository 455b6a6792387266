"""The gradients of the linear refiner that run over maps: the map's own, and the kernel's.

    g[r−a] · V[c−b]ᵀ ── Σ_{a,b,o} W[o,i,a,b] ──> ∂A[r,c]      nothing of M maps is written; ∂A is, once
    A[r+a], g[r] · V[c−b]ᵀ ── Σ_{r,c} ──> ∂W[o,i,a,b]         a sum a program, added up in float64

Where maps or a head's width are too many for registers, several launches add to ∂A, then in fp32.
Bytes of maps that move, of two-byte entries: 2 written for ∂A, 2 read for ∂W. Axes: see linear_tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.fused.launching import launch
from refiner_ds.attention.fused.linear_tiles import KEYS, ROWS, WARPS, map_tile, slices, stages, tap, vectors
from refiner_ds.attention.fused.tools import at_least_16, mix_stored, product

__all__ = ["kernel_gradient", "map_gradient"]

# Columns of a head that a program multiplies, by the bytes of a number: with more, fp32 spills kilobytes.
WIDEST = {2: 64, 4: 16}

# Row tiles of a program that sums up the kernel's gradient: its sums take 12 KB, a row tile of 12 bf16 maps of 197
# tokens 76 KB, and 64 images still make 256 programs.
STEPS = 4


@triton.jit
def _map_gradient(
    grad_BMNd, value_BHNd, kernel_MHkk, d_map_BHNN, grad_strides, value_strides,
    first, heads, maps, shares, tokens, width,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    image = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head_H = tl.program_id(1) * 16 + tl.arange(0, 16)
    map_M = first + tl.arange(0, 16)
    here_M = map_M < maps
    grad_MNd = grad_BMNd + image * grad_strides[0]
    value_HNd = value_BHNd + image * value_strides[0]
    d_map_HNN = d_map_BHNN + image * heads * tokens * tokens
    grads = tl.tuple(())
    for row in tl.static_range(TAPS):
        moved_R = row_R - (row - RADIUS)
        grads = grads + (vectors(grad_MNd, map_M, here_M, moved_R, grad_strides, tokens, width, WIDTH),)
    for start in range(0, tokens, KEYS):
        key_K = start + tl.arange(0, KEYS)
        d_map_HL = tl.zeros([16, ROWS * KEYS], tl.float32)
        for column in tl.static_range(TAPS):
            moved_K = key_K - (column - RADIUS)
            value_MKd = vectors(value_HNd, map_M // shares, here_M, moved_K, value_strides, tokens, width, WIDTH)
            for row in tl.static_range(TAPS):
                d_refined_MRK = product(grads[row], tl.trans(value_MKd, 0, 2, 1)).to(value_MKd.dtype)
                tap_HM = tap(kernel_MHkk, map_M[None, :], head_H[:, None], maps, heads, row, column, TAPS)
                d_map_HL = mix_stored(tap_HM, tl.reshape(d_refined_MRK, [16, ROWS * KEYS]), d_map_HL)
        here_RK = (row_R < tokens)[:, None] & (key_K < tokens)[None, :]
        here_HRK = (head_H < heads)[:, None, None] & here_RK[None, :, :]
        place_HRK = (head_H[:, None, None] * tokens + row_R[None, :, None]) * tokens + key_K[None, None, :]
        d_map_HRK = tl.reshape(d_map_HL, [16, ROWS, KEYS])
        if ADD:
            d_map_HRK += tl.load(d_map_HNN + place_HRK, mask=here_HRK, other=0.0).to(tl.float32)
        tl.store(d_map_HNN + place_HRK, d_map_HRK.to(d_map_BHNN.dtype.element_ty), mask=here_HRK)


def map_gradient(grad_BMNd: Tensor, value_BHNd: Tensor, kernel_MHkk: Tensor) -> Tensor:
    """The gradient of the map in ``linear_forward.refined_attend``, [B, H, N, N], contiguous.

    Args:
        grad_BMNd: the gradient of the result.
        value_BHNd, kernel_MHkk: as there.
    Returns:
        In the values' dtype; in fp32 where more than 16 maps, or wide heads, take more than one launch.
    """
    batch, shared, tokens, width = value_BHNd.shape
    maps, heads, taps, _ = kernel_MHkk.shape
    wide, kernel_MHkk = WIDEST[value_BHNd.element_size()], kernel_MHkk.contiguous()
    whole = maps <= 16 and width <= wide
    d_map_BHNN = value_BHNd.new_empty(batch, heads, tokens, tokens, dtype=None if whole else torch.float32)
    add = False
    for first in range(0, maps, 16):
        for grad, value in slices(wide, grad_BMNd, value_BHNd):
            launch(
                _map_gradient, (triton.cdiv(tokens, ROWS), triton.cdiv(heads, 16), batch),
                grad, value, kernel_MHkk, d_map_BHNN, grad.stride()[:3], value.stride()[:3],
                first, heads, maps, maps // shared, tokens, value.shape[-1],
                TAPS=taps, WIDTH=at_least_16(value.shape[-1]), ADD=add, ROWS=ROWS, KEYS=KEYS,
                num_warps=WARPS, num_stages=stages(value),
            )  # fmt: skip
            add = True
    return d_map_BHNN


@triton.jit
def _side_by_side(first_ML, second_ML, third_ML):
    """Three [M, L] and a fourth of zeros as [L, 4·M]."""
    outer_ML2, inner_ML2 = tl.join(first_ML, third_ML), tl.join(second_ML, tl.zeros_like(second_ML))
    all_L22M = tl.permute(tl.join(outer_ML2, inner_ML2), 1, 2, 3, 0)
    return tl.reshape(all_L22M, [all_L22M.shape[0], 4 * all_L22M.shape[3]])


@triton.jit
def _correlate(map_HL, moved_LS, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """map · moved, [H, S]; in fp32 row by row, as every warp would need the tile's maps in its registers."""
    if map_HL.dtype == tl.float32:
        map_RHK = tl.permute(tl.reshape(map_HL, [16, ROWS, KEYS]), 1, 0, 2)
        return tl.sum(product(map_RHK, tl.reshape(moved_LS, [ROWS, KEYS, moved_LS.shape[1]])), 0)
    else:
        return product(map_HL, moved_LS)


@triton.jit
def _kernel_gradient(
    map_BHNN, grad_BMNd, value_BHNd, sums_PkHkM, map_strides, grad_strides, value_strides,
    first, heads, maps, shares, tokens, width,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    SIDE: tl.constexpr = 16 * COLUMNS
    part, group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_H = group * 16 + tl.arange(0, 16)
    map_M = first + tl.arange(0, 16)
    here_M = map_M < maps
    map_HNN = map_BHNN + image * map_strides[0]
    grad_MNd = grad_BMNd + image * grad_strides[0]
    value_HNd = value_BHNd + image * value_strides[0]
    sums = tl.tuple(())
    for _row in tl.static_range(TAPS):
        sums = sums + (tl.zeros([16, SIDE], tl.float32),)
    for step in range(STEPS):
        row_R = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        grad_MRd = vectors(grad_MNd, map_M, here_M, row_R, grad_strides, tokens, width, WIDTH)
        for start in range(0, tokens, KEYS):
            key_K = start + tl.arange(0, KEYS)
            moved = tl.tuple(())
            for column in tl.static_range(TAPS):
                moved_K = key_K - (column - RADIUS)
                value_MKd = vectors(value_HNd, map_M // shares, here_M, moved_K, value_strides, tokens, width, WIDTH)
                d_refined_MRK = product(grad_MRd, tl.trans(value_MKd, 0, 2, 1)).to(map_BHNN.dtype.element_ty)
                moved = moved + (tl.reshape(d_refined_MRK, [16, ROWS * KEYS]),)
            if TAPS == 1:
                moved_LS = tl.trans(moved[0])
            else:
                moved_LS = _side_by_side(moved[0], moved[1], moved[2])
            more = tl.tuple(())
            for row in tl.static_range(TAPS):
                map_HL = map_tile(map_HNN, head_H, row_R + (row - RADIUS), key_K, map_strides, heads, tokens)
                more = more + (sums[row] + _correlate(map_HL, moved_LS, ROWS, KEYS),)
            sums = more
    program = (image * tl.num_programs(0) + part) * tl.num_programs(1) + group
    place_HS = tl.arange(0, 16)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    for row in tl.static_range(TAPS):
        tl.store(sums_PkHkM + (program * TAPS + row) * 16 * SIDE + place_HS, sums[row])


def kernel_gradient(map_BHNN: Tensor, grad_BMNd: Tensor, value_BHNd: Tensor, taps: int) -> Tensor:
    """The gradient of the kernel in ``linear_forward.refined_attend``, [M, H, k, k], float64.

    Args:
        map_BHNN, value_BHNd: as there.
        grad_BMNd: the gradient of the result.
        taps: k, 1 or 3.
    """
    batch, heads, tokens, _ = map_BHNN.shape
    maps, shares = grad_BMNd.shape[1], grad_BMNd.shape[1] // value_BHNd.shape[1]
    groups, parts, columns = triton.cdiv(heads, 16), triton.cdiv(tokens, ROWS * STEPS), 1 if taps == 1 else 4
    d_kernel_MHkk = map_BHNN.new_zeros(maps, groups * 16, taps, taps, dtype=torch.float64)
    sums_PGkHkM = map_BHNN.new_empty(batch * parts, groups, taps, 16, columns, 16, dtype=torch.float32)
    for first in range(0, maps, 16):
        for grad, value in slices(WIDEST[value_BHNd.element_size()], grad_BMNd, value_BHNd):
            launch(
                _kernel_gradient, (parts, groups, batch), map_BHNN, grad, value, sums_PGkHkM,
                map_BHNN.stride(), grad.stride()[:3], value.stride()[:3],
                first, heads, maps, shares, tokens, value.shape[-1],
                TAPS=taps, COLUMNS=columns, WIDTH=at_least_16(value.shape[-1]), STEPS=STEPS, ROWS=ROWS, KEYS=KEYS,
                num_warps=WARPS, num_stages=1,  # with more, pipelined loads spill
            )  # fmt: skip
            sum_MGHkk = sums_PGkHkM.sum(0, dtype=torch.float64).permute(4, 0, 2, 1, 3)[..., :taps]
            d_kernel_MHkk[first : first + 16] += sum_MGHkk.flatten(1, 2)[: maps - first]
    return d_kernel_MHkk[:, :heads]
