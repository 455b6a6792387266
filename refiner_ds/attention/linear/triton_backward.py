"""The gradients of the linear refiner that read or write maps: the map's own, and the kernel's.

    g[r−a] · V[c−b]ᵀ ── Σ_{a,b,o} W[o,i,a,b] ──> ∂A[r,c]      ∂A is written once, nothing of M maps
    A[r+a], g[r] · V[c−b]ᵀ ── Σ_{r,c} ──> ∂W[o,i,a,b]         one sum for each program, added up in float64

Where maps or a head's width are too many for registers, several launches add to ∂A, then in fp32.
Bytes of maps that move, of two-byte entries: 2 written for ∂A, 2 read for ∂W. Axes: see triton_loads.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.configurations import sizes_of
from refiner_ds.attention.kernels.dot import as_sum, dot, dot_split_weight, padded_size, zero_sums
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.padded import empty_padded, row_stride, to_padded
from refiner_ds.attention.linear.triton_loads import WARPS, map_tiles, slices, stages, tap, vectors
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["kernel_gradient", "map_gradient", "takes_one_launch"]

# Columns of a head in a program, by the bytes of a number: with more, fp32 spills kilobytes.
WIDEST = {2: 64, 4: 16, 8: 16}

# A tile: compiled for Hopper in bf16, map_gradient takes 128 registers for 12 heads of 32, so that two programs fit on
# a multiprocessor, and nothing spills; with 16 keys one fits, for a tenth fewer instructions. Not measured on a GPU.
ROWS = 16
KEYS = 8

# Row tiles of a program of the kernel's gradient: its sums take 12 KB, a row tile of 12 bf16 maps of 197 tokens 76 KB,
# and 64 images still make 256 programs.
STEPS = 4


@triton.jit
def _map_gradient(
    grad_BMNd, value_BHNd, kernel_MHkk, d_map_BHNN, grad_strides, value_strides,
    first, heads, maps, shared_by, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    image = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head_H = tl.program_id(1) * 16 + tl.arange(0, 16)
    map_M = first + tl.arange(0, 16)
    valid_M = map_M < maps
    grad_MNd = grad_BMNd + image * grad_strides[0]
    value_HNd = value_BHNd + image * value_strides[0]
    d_map_HNN = d_map_BHNN + image * heads * (TOKENS * STRIDE)
    grads = tl.tuple(())
    for row in tl.static_range(TAPS):
        moved_R = row_R - (row - RADIUS)
        grads = grads + (vectors(grad_MNd, map_M, valid_M, moved_R, grad_strides, width, TOKENS, WIDTH),)
    # Loaded before the loop: its stores would make the compiler load them again.
    taps = tl.tuple(())
    for column in tl.static_range(TAPS):
        for row in tl.static_range(TAPS):
            taps = taps + (tap(kernel_MHkk, map_M[None, :], head_H[:, None], maps, heads, row, column, TAPS),)
    for start in range(0, TOKENS, KEYS):
        key_K = start + tl.arange(0, KEYS)
        d_map_HL = zero_sums([16, ROWS * KEYS], value_BHNd.dtype.element_ty)
        for column in tl.static_range(TAPS):
            moved_K = key_K - (column - RADIUS)
            value_MKd = vectors(value_HNd, map_M // shared_by, valid_M, moved_K, value_strides, width, TOKENS, WIDTH)
            for row in tl.static_range(TAPS):
                d_refined_MRK = dot(grads[row], tl.trans(value_MKd, 0, 2, 1)).to(value_MKd.dtype)
                d_refined_ML = tl.reshape(d_refined_MRK, [16, ROWS * KEYS])
                d_map_HL = dot_split_weight(taps[column * TAPS + row], d_refined_ML, d_map_HL)
        stored_RK = (row_R < TOKENS)[:, None] & (key_K < STRIDE)[None, :]
        stored_HRK = (head_H < heads)[:, None, None] & stored_RK[None, :, :]
        offset_HRK = (head_H[:, None, None] * TOKENS + row_R[None, :, None]) * STRIDE + key_K[None, None, :]
        d_map_HRK = tl.where((key_K < TOKENS)[None, None, :], tl.reshape(d_map_HL, [16, ROWS, KEYS]), 0.0)
        if ADD:
            d_map_HRK += as_sum(tl.load(d_map_HNN + offset_HRK, mask=stored_HRK, other=0.0))
        tl.store(d_map_HNN + offset_HRK, d_map_HRK.to(d_map_BHNN.dtype.element_ty), mask=stored_HRK)


def map_gradient(grad_BMNd: Tensor, value_BHNd: Tensor, kernel_MHkk: Tensor) -> Tensor:
    """The gradient of the map in ``linear_forward.refined_attend``, [B, H, N, N], padded.

    Args:
        grad_BMNd: the gradient of the result.
        value_BHNd, kernel_MHkk: as there.
    Returns:
        In the values' dtype; in that of statistics where more than 16 maps, or wide heads, take more than one launch.
    """
    batch, shared, tokens, width = value_BHNd.shape
    maps, heads, taps, _ = kernel_MHkk.shape
    wide, kernel_MHkk = WIDEST[value_BHNd.element_size()], kernel_MHkk.contiguous()
    dtype = None if takes_one_launch(maps, value_BHNd) else statistics_dtype(value_BHNd.dtype)
    d_map_BHNN = empty_padded(value_BHNd, heads, dtype)
    add = False
    for first in range(0, maps, 16):
        for grad, value in slices(wide, grad_BMNd, value_BHNd):
            usual = {"ROWS": ROWS, "KEYS": KEYS, "num_warps": WARPS, "num_stages": stages(value)}
            sizes = sizes_of("map_gradient", architecture(value.device), **usual)
            launch(
                _map_gradient, (triton.cdiv(tokens, sizes["ROWS"]), triton.cdiv(heads, 16), batch),
                grad, value, kernel_MHkk, d_map_BHNN, grad.stride()[:3], value.stride()[:3],
                first, heads, maps, maps // shared, value.shape[-1],
                TOKENS=tokens, STRIDE=row_stride(tokens), TAPS=taps, WIDTH=padded_size(value.shape[-1]), ADD=add,
                **sizes,
            )  # fmt: skip
            add = True
    return d_map_BHNN


def takes_one_launch(maps: int, value_BHNd: Tensor) -> bool:
    """Whether :func:`map_gradient` writes once, in the values' dtype, rather than adding in fp32."""
    return maps <= 16 and value_BHNd.shape[-1] <= WIDEST[value_BHNd.element_size()]


@triton.jit
def _stack_rows(first_ML, second_ML, third_ML):
    """Three [M, L] and one of zeros as [4·M, L]: the rows that Hopper's tensor cores take from shared memory."""
    outer_ML2, inner_ML2 = tl.join(first_ML, third_ML), tl.join(second_ML, tl.zeros_like(second_ML))
    all_22ML = tl.permute(tl.join(outer_ML2, inner_ML2), 2, 3, 0, 1)
    return tl.reshape(all_22ML, [4 * all_22ML.shape[2], all_22ML.shape[3]])


@triton.jit
def _correlate(moved_SL, map_HL, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """moved · mapᵀ, [S, H]; in fp32 row by row, as every warp would need the tile's maps in its registers."""
    if map_HL.dtype == tl.float32 or map_HL.dtype == tl.float64:
        moved_RSK = tl.permute(tl.reshape(moved_SL, [moved_SL.shape[0], ROWS, KEYS]), 1, 0, 2)
        map_RKH = tl.permute(tl.reshape(map_HL, [16, ROWS, KEYS]), 1, 2, 0)
        return tl.sum(dot(moved_RSK, map_RKH), 0)
    else:
        return dot(moved_SL, tl.trans(map_HL))


@triton.jit
def _kernel_gradient(
    map_BHNN, grad_BMNd, value_BHNd, sums_PkkMH, grad_strides, value_strides,
    first, heads, maps, shared_by, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    SIDE: tl.constexpr = 16 * COLUMNS
    part, group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_H = group * 16 + tl.arange(0, 16)
    map_M = first + tl.arange(0, 16)
    valid_M = map_M < maps
    map_HNN = map_BHNN + image * heads * (TOKENS * STRIDE)
    grad_MNd = grad_BMNd + image * grad_strides[0]
    value_HNd = value_BHNd + image * value_strides[0]
    sums = tl.tuple(())
    for _row in tl.static_range(TAPS):
        sums = sums + (zero_sums([SIDE, 16], map_BHNN.dtype.element_ty),)
    for step in range(STEPS):
        first_row = (part * STEPS + step) * ROWS
        row_R = first_row + tl.arange(0, ROWS)
        grad_MRd = vectors(grad_MNd, map_M, valid_M, row_R, grad_strides, width, TOKENS, WIDTH)
        for start in range(0, TOKENS, KEYS):
            key_K = start + tl.arange(0, KEYS)
            moved = tl.tuple(())
            for column in tl.static_range(TAPS):
                moved_K = key_K - (column - RADIUS)
                value_MKd = vectors(
                    value_HNd, map_M // shared_by, valid_M, moved_K, value_strides, width, TOKENS, WIDTH
                )
                d_refined_MRK = dot(grad_MRd, tl.trans(value_MKd, 0, 2, 1)).to(map_BHNN.dtype.element_ty)
                moved = moved + (tl.reshape(d_refined_MRK, [16, ROWS * KEYS]),)
            if TAPS == 1:
                moved_SL = moved[0]
            else:
                moved_SL = _stack_rows(moved[0], moved[1], moved[2])
            tiles = map_tiles(map_HNN, head_H, first_row, key_K, heads, TAPS, ROWS, TOKENS, STRIDE)
            more = tl.tuple(())
            for row in tl.static_range(TAPS):
                more = more + (sums[row] + _correlate(moved_SL, tiles[row], ROWS, KEYS),)
            sums = more
    program = (image * tl.num_programs(0) + part) * tl.num_programs(1) + group
    offset_SH = tl.arange(0, SIDE)[:, None] * 16 + tl.arange(0, 16)[None, :]
    for row in tl.static_range(TAPS):
        tl.store(sums_PkkMH + (program * TAPS + row) * 16 * SIDE + offset_SH, sums[row])


def kernel_gradient(map_BHNN: Tensor, grad_BMNd: Tensor, value_BHNd: Tensor, taps: int) -> Tensor:
    """The gradient of the kernel in ``linear_forward.refined_attend``, [M, H, k, k], float64.

    Args:
        map_BHNN, value_BHNd: as there.
        grad_BMNd: the gradient of the result.
        taps: k, 1 or 3.
    """
    map_BHNN = to_padded(map_BHNN)
    batch, heads, tokens, _ = map_BHNN.shape
    maps, shared_by = grad_BMNd.shape[1], grad_BMNd.shape[1] // value_BHNd.shape[1]
    # In more stages pipelined loads spill.
    usual = {"ROWS": ROWS, "KEYS": KEYS, "STEPS": STEPS, "num_warps": WARPS, "num_stages": 1}
    sizes = sizes_of("kernel_gradient", architecture(map_BHNN.device), **usual)
    parts = triton.cdiv(tokens, sizes["ROWS"] * sizes["STEPS"])
    groups, columns = triton.cdiv(heads, 16), 1 if taps == 1 else 4
    d_kernel_MHkk = map_BHNN.new_zeros(maps, groups * 16, taps, taps, dtype=torch.float64)
    sums_PGkkMH = map_BHNN.new_empty(
        batch * parts, groups, taps, columns, 16, 16, dtype=statistics_dtype(map_BHNN.dtype)
    )
    for first in range(0, maps, 16):
        for grad, value in slices(WIDEST[value_BHNd.element_size()], grad_BMNd, value_BHNd):
            launch(
                _kernel_gradient, (parts, groups, batch), map_BHNN, grad, value, sums_PGkkMH,
                grad.stride()[:3], value.stride()[:3], first, heads, maps, shared_by, value.shape[-1],
                TOKENS=tokens, STRIDE=row_stride(tokens), TAPS=taps, COLUMNS=columns,
                WIDTH=padded_size(value.shape[-1]), **sizes,
            )  # fmt: skip
            sum_MGHkk = sums_PGkkMH.sum(0, dtype=torch.float64).permute(3, 0, 4, 1, 2)[..., :taps]
            d_kernel_MHkk[first : first + 16] += sum_MGHkk.flatten(1, 2)[: maps - first]
    return d_kernel_MHkk[:, :heads]
