"""Refined maps times values without a refined map: heads are mixed in a tile, and taps along the keys shift the values.

    A rows r+a, keys c ── Σ_{a,i} W[o,i,a,b] ──> a tile in registers, · V[c−b] ──> out[r], summed over b and c

The shift identity of ``equations.refined_by_shifts``, with the query taps read from A's rows instead of added to three
outputs: a third of the products with V. The gradient of the values is the same with rows and keys exchanged. A map's
bytes are read once; neighbouring rows come from cache. Axes: see triton_loads.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.configurations import sizes_of
from refiner_ds.attention.kernels.dot import dot, dot_split_weight, padded_size, zero_sums
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.padded import is_padded, row_stride, to_padded
from refiner_ds.attention.linear.triton_loads import KEYS, WARPS, map_tiles, slices, stages, tap, vectors

__all__ = ["refined_attend"]

# Columns of a head in a program, by the bytes of a number, so that little or nothing spills.
WIDEST = {2: 64, 4: 32, 8: 32}


def _rows(value_BMNd: Tensor, heads: int) -> int:
    """Rows of a tile, 32 where nothing spills.

    Compiled for Hopper in bf16, 12 or 16 heads of 32 then take 220 to 250 registers; 16 rows are a quarter more
    instructions an entry, and still too many registers for two programs on a multiprocessor. Not measured on a GPU.
    """
    return 32 if value_BMNd.element_size() == 2 and value_BMNd.shape[-1] <= 32 and heads <= 16 else 16


@triton.jit
def _mix_and_shift(
    map_BHNN, value_BMNd, kernel_MHkk, out_BMNd, value_strides, out_strides, heads, maps, shared_by, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    image = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    row_R = first_row + tl.arange(0, ROWS)
    map_M = tl.program_id(1) * 16 + tl.arange(0, 16)
    valid_M = map_M < maps
    map_HNN = map_BHNN + image * heads * (TOKENS * STRIDE)
    value_MNd = value_BMNd + image * value_strides[0]
    out_MRd = zero_sums([16, ROWS, WIDTH], map_BHNN.dtype.element_ty)
    for start in range(0, TOKENS, KEYS):
        key_K = start + tl.arange(0, KEYS)
        for column in tl.static_range(TAPS):
            refined_ML = zero_sums([16, ROWS * KEYS], map_BHNN.dtype.element_ty)
            for group in tl.static_range(GROUPS):
                head_H = group * 16 + tl.arange(0, 16)
                # Loaded once for all columns: the compiler sees that they are equal.
                tiles = map_tiles(map_HNN, head_H, first_row, key_K, heads, TAPS, ROWS, TOKENS, STRIDE, TRANSPOSED)
                for row in tl.static_range(TAPS):
                    tap_MH = tap(kernel_MHkk, map_M[:, None], head_H[None, :], maps, heads, row, column, TAPS)
                    refined_ML = dot_split_weight(tap_MH, tiles[row], refined_ML)
            moved_K = key_K - (column - RADIUS)
            value_MKd = vectors(value_MNd, map_M // shared_by, valid_M, moved_K, value_strides, width, TOKENS, WIDTH)
            refined_ML = refined_ML.to(value_MKd.dtype)
            if TRANSPOSED:
                refined_MRK = tl.trans(tl.reshape(refined_ML, [16, KEYS, ROWS]), 0, 2, 1)
            else:
                refined_MRK = tl.reshape(refined_ML, [16, ROWS, KEYS])
            out_MRd += dot(refined_MRK, value_MKd)
    at_d = tl.arange(0, WIDTH)
    valid_MRd = valid_M[:, None, None] & (row_R < TOKENS)[None, :, None] & (at_d < width)[None, None, :]
    offset_MR = map_M[:, None] * out_strides[1] + row_R[None, :] * out_strides[2]
    offset_MRd = image * out_strides[0] + offset_MR[:, :, None] + at_d[None, None, :]
    tl.store(out_BMNd + offset_MRd, out_MRd.to(out_BMNd.dtype.element_ty), mask=valid_MRd)


def refined_attend(
    map_BHNN: Tensor, value_BHNd: Tensor, kernel_MHkk: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Maps convolved with a kernel, times values: [B, M, N, d] in ``dtype``, the values' own if ``None``.

    The result is contiguous as [B, N, M, d], so that joining a token's heads copies nothing.

    Args:
        map_BHNN: maps, fp32 or half precision, in the interpreter float64 too; the transpose of padded ones is read
            without a copy.
        value_BHNd: values in any layout; where there are fewer than M, every M/H maps in turn share one head's.
        kernel_MHkk: the kernel in fp32 or float64, k 1 or 3; zero outside the map.
    """
    batch, heads, tokens, _ = map_BHNN.shape
    transposed = is_padded(map_BHNN.mT) and not is_padded(map_BHNN)
    map_BHNN = map_BHNN.mT if transposed else to_padded(map_BHNN)
    maps, taps, width = kernel_MHkk.shape[0], kernel_MHkk.shape[-1], value_BHNd.shape[-1]
    out_BMNd = value_BHNd.new_empty(batch, tokens, maps, width, dtype=dtype).transpose(1, 2)
    kernel_MHkk = kernel_MHkk.contiguous()
    for value, out in slices(WIDEST[value_BHNd.element_size()], value_BHNd, out_BMNd):
        usual = {"ROWS": _rows(value, heads), "KEYS": KEYS, "num_warps": WARPS, "num_stages": stages(value)}
        sizes = sizes_of("mix_and_shift", architecture(value.device), **usual)
        launch(
            _mix_and_shift, (triton.cdiv(tokens, sizes["ROWS"]), triton.cdiv(maps, 16), batch),
            map_BHNN, value, kernel_MHkk, out, value.stride()[:3], out.stride()[:3],
            heads, maps, maps // value.shape[1], value.shape[-1],
            TOKENS=tokens, STRIDE=row_stride(tokens), TRANSPOSED=transposed, TAPS=taps,
            GROUPS=triton.cdiv(heads, 16), WIDTH=padded_size(value.shape[-1]), **sizes,
        )  # fmt: skip
    return out_BMNd
