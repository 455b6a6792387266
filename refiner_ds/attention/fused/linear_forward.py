"""Refined maps times values without a refined map: heads are mixed in a tile, and taps along the keys move values.

    A rows r+a, keys c ── Σ_{a,i} W[o,i,a,b] ──> a tile in registers, · V[c−b] ──> out[r], summed over b and c

The shift identity of ``reference.refined_by_shifts``, with the query taps gathered from A's rows instead of added to
three outputs: a third of the products with V. The gradient of the values is the same with rows and keys exchanged.
Bytes of maps that move: a map's are read once (the neighbouring rows come from cache). Axes: see linear_tiles.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.fused.launching import launch
from refiner_ds.attention.fused.linear_tiles import KEYS, ROWS, WARPS, map_tile, slices, stages, tap, vectors
from refiner_ds.attention.fused.tools import at_least_16, mix_stored, product

__all__ = ["refined_attend"]

# Columns of a head that a program sums up, by the bytes of a number, so that little or nothing spills.
WIDEST = {2: 64, 4: 32}


@triton.jit
def _mix_and_shift(
    map_BHNN, value_BMNd, kernel_MHkk, out_BMNd, map_strides, value_strides, out_strides,
    heads, maps, shares, tokens, width,
    TAPS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = TAPS // 2
    image = tl.program_id(2).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    map_M = tl.program_id(1) * 16 + tl.arange(0, 16)
    here_M = map_M < maps
    map_HNN = map_BHNN + image * map_strides[0]
    value_MNd = value_BMNd + image * value_strides[0]
    out_MRd = tl.zeros([16, ROWS, WIDTH], tl.float32)
    for start in range(0, tokens, KEYS):
        key_K = start + tl.arange(0, KEYS)
        for column in tl.static_range(TAPS):
            refined_ML = tl.zeros([16, ROWS * KEYS], tl.float32)
            for group in tl.static_range(GROUPS):
                head_H = group * 16 + tl.arange(0, 16)
                for row in tl.static_range(TAPS):  # loaded once for all columns: the compiler sees that they are equal
                    map_HL = map_tile(map_HNN, head_H, row_R + (row - RADIUS), key_K, map_strides, heads, tokens)
                    tap_MH = tap(kernel_MHkk, map_M[:, None], head_H[None, :], maps, heads, row, column, TAPS)
                    refined_ML = mix_stored(tap_MH, map_HL, refined_ML)
            moved_K = key_K - (column - RADIUS)
            value_MKd = vectors(value_MNd, map_M // shares, here_M, moved_K, value_strides, tokens, width, WIDTH)
            refined_MRK = tl.reshape(refined_ML, [16, ROWS, KEYS])
            out_MRd += product(refined_MRK.to(value_MKd.dtype), value_MKd)
    at_d = tl.arange(0, WIDTH)
    here_MRd = here_M[:, None, None] & (row_R < tokens)[None, :, None] & (at_d < width)[None, None, :]
    place_MR = map_M[:, None] * out_strides[1] + row_R[None, :] * out_strides[2]
    place_MRd = image * out_strides[0] + place_MR[:, :, None] + at_d[None, None, :]
    tl.store(out_BMNd + place_MRd, out_MRd.to(out_BMNd.dtype.element_ty), mask=here_MRd)


def refined_attend(
    map_BHNN: Tensor, value_BHNd: Tensor, kernel_MHkk: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Maps convolved with a kernel, times values: [B, M, N, d] in ``dtype``, the values' own if ``None``.

    The result lies in memory as [B, N, M, d]: what follows joins a token's heads.

    Args:
        map_BHNN: maps, fp32 or half precision, in any layout.
        value_BHNd: values in any layout; where there are fewer than M, every M/H maps in turn share one head's.
        kernel_MHkk: the kernel in fp32, k 1 or 3; zero outside the map.
    """
    batch, heads, tokens, _ = map_BHNN.shape
    maps, taps, width = kernel_MHkk.shape[0], kernel_MHkk.shape[-1], value_BHNd.shape[-1]
    out_BMNd = value_BHNd.new_empty(batch, tokens, maps, width, dtype=dtype).transpose(1, 2)
    kernel_MHkk = kernel_MHkk.contiguous()
    for value, out in slices(WIDEST[value_BHNd.element_size()], value_BHNd, out_BMNd):
        launch(
            _mix_and_shift, (triton.cdiv(tokens, ROWS), triton.cdiv(maps, 16), batch),
            map_BHNN, value, kernel_MHkk, out, map_BHNN.stride(), value.stride()[:3], out.stride()[:3],
            heads, maps, maps // value.shape[1], tokens, value.shape[-1],
            TAPS=taps, GROUPS=triton.cdiv(heads, 16), WIDTH=at_least_16(value.shape[-1]), ROWS=ROWS, KEYS=KEYS,
            num_warps=WARPS, num_stages=stages(value),
        )  # fmt: skip
    return out_BMNd
