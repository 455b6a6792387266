"""Loads of the linear refiner's kernels: tiles of maps, vectors of some tokens, and single taps of the kernel.

Each works on 16 maps and 16 heads at a time, whatever their number, so that a program's registers do not depend on it.
Axes: B batch, H heads, M maps that multiply values, N tokens, d head width; R, K the rows and keys of a tile, L = R·K.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.dot import dense_rows
from refiner_ds.attention.kernels.launch import shared_memory

__all__ = ["KEYS", "WARPS", "map_tiles", "slices", "stages", "tap", "vectors"]

# Keys of a forward tile, and warps of every program; triton_forward.py and triton_backward.py have the rest.
KEYS = 16
WARPS = 8


def slices(wide: int, *tensors_BMNd: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each tensor cut into slices of ``wide`` columns, as many as fit into registers; views where possible."""
    yield from zip(*(dense_rows(x_BMNd).split(wide, -1) for x_BMNd in tensors_BMNd), strict=True)


def stages(value_BMNd: Tensor) -> int:
    """Pipeline stages of loads: two where they fit into shared memory, which takes 153 KiB; an L40S has 99."""
    fits = value_BMNd.element_size() == 2 and value_BMNd.shape[-1] <= 32
    return 2 if fits and shared_memory(value_BMNd.device) >= 160 << 10 else 1


@triton.jit
def map_tiles(
    map_HNN, head_H, first_row, key_K, heads,
    TAPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Maps of one image at the rows that each tap reads, each [H, R·K], zero outside the map.

    With ``TRANSPOSED``, the maps in memory are the transposes, and the tiles are [H, K·R].
    """
    RADIUS: tl.constexpr = TAPS // 2
    HEADS: tl.constexpr = head_H.shape[0]
    LENGTH: tl.constexpr = ROWS * key_K.shape[0]
    row_R = first_row + tl.arange(0, ROWS)
    valid_H11 = (head_H < heads)[:, None, None]
    head_H11 = map_HNN + head_H[:, None, None] * (TOKENS * STRIDE)
    # The padding of a row is read rather than masked, so that loads are of 16 bytes.
    tiles = tl.tuple(())
    if not TRANSPOSED:
        valid_H1K = valid_H11 & (key_K < STRIDE)[None, None, :]
        for row in tl.static_range(TAPS):
            moved_R = row_R + (row - RADIUS)
            valid_HRK = valid_H1K & ((moved_R >= 0) & (moved_R < TOKENS))[None, :, None]
            offset_RK = moved_R[:, None] * STRIDE + key_K[None, :]
            tile_HRK = tl.load(head_H11 + offset_RK[None, :, :], mask=valid_HRK, other=0.0)
            tiles = tiles + (tl.reshape(tile_HRK, [HEADS, LENGTH]),)
    else:
        valid_HK1 = valid_H11 & (key_K < TOKENS)[None, :, None]
        key_HK1 = head_H11 + key_K[None, :, None] * STRIDE
        valid_HKR = valid_HK1 & (row_R < STRIDE)[None, None, :]
        tile_HKR = tl.load(key_HK1 + row_R[None, None, :], mask=valid_HKR, other=0.0)
        if TAPS == 1:
            tiles = tiles + (tl.reshape(tile_HKR, [HEADS, LENGTH]),)
        else:
            tl.static_assert(TAPS == 3)
            # Loads one entry off would take two bytes at a time: a thread shifts its eight entries instead, G = R/8.
            before_G = first_row - 1 + tl.arange(0, ROWS // 8) * 8
            valid_HKG = valid_HK1 & ((before_G >= 0) & (before_G < STRIDE))[None, None, :]
            before_HKG = tl.load(key_HK1 + before_G[None, None, :], mask=valid_HKG, other=0.0)
            valid_HKG = valid_HK1 & (before_G + 9 < STRIDE)[None, None, :]
            behind_HKG = tl.load(key_HK1 + (before_G + 9)[None, None, :], mask=valid_HKG, other=0.0)
            tile_HKG8 = tl.reshape(tile_HKR, [HEADS, LENGTH // ROWS, ROWS // 8, 8])
            tiles = tiles + (tl.reshape(_one_before(tile_HKG8, before_HKG), [HEADS, LENGTH]),)
            tiles = tiles + (tl.reshape(tile_HKR, [HEADS, LENGTH]),)
            tiles = tiles + (tl.reshape(_one_behind(tile_HKG8, behind_HKG), [HEADS, LENGTH]),)
    return tiles


@triton.jit
def _halves(x):
    """Every bwd_reduce entry of the last axis, from the first and from the bwd_reduce one on."""
    return tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))


@triton.jit
def _merged(even, odd):
    """What :func:`_halves` takes apart."""
    return tl.reshape(tl.join(even, odd), even.shape[:-1] + [even.shape[-1] * 2])


@triton.jit
def _one_before(x_HKG8, first_HKG):
    """``first``, then all but the last along the last axis; no data leaves its thread."""
    even, odd = _halves(x_HKG8)
    odd02, odd13 = _halves(odd)
    odd1, _ = tl.split(odd13)
    return _merged(_merged(tl.join(first_HKG, odd1), odd02), even)


@triton.jit
def _one_behind(x_HKG8, last_HKG):
    """All but the first along the last axis, then ``last``."""
    even, odd = _halves(x_HKG8)
    even02, even13 = _halves(even)
    _, even2 = tl.split(even02)
    return _merged(odd, _merged(even13, tl.join(even2, last_HKG)))


@triton.jit
def vectors(x_MNd, plane_M, valid_M, token_R, strides, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Some tokens' vectors of one image, [M, R, WIDTH], zero outside; ``plane_M`` are their heads."""
    at_d = tl.arange(0, WIDTH)
    valid_MR = valid_M[:, None] & ((token_R >= 0) & (token_R < TOKENS))[None, :]
    valid_MRd = valid_MR[:, :, None] & (at_d < width)[None, None, :]
    token_MR1 = x_MNd + plane_M[:, None, None] * strides[1] + token_R[None, :, None] * strides[2]
    return tl.load(token_MR1 + at_d[None, None, :], mask=valid_MRd, other=0.0)


@triton.jit
def tap(kernel_MHkk, map_, head, maps, heads, row, column, TAPS: tl.constexpr):
    """One tap of the kernel for given maps and heads, broadcast together; zero outside."""
    offset = ((map_ * heads + head) * TAPS + row) * TAPS + column
    return tl.load(kernel_MHkk + offset, mask=(map_ < maps) & (head < heads), other=0.0)
