"""What the linear refiner's kernels load: tiles of maps, vectors of some tokens, and single taps of the kernel.

Each works on 16 maps and 16 heads at a time, whatever their number, so that a program's registers do not depend on it.
Axes: B batch, H heads, M maps that multiply values, N tokens, d head width; R, K the rows and keys of a tile, L = R·K.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.fused.tools import readable

__all__ = ["KEYS", "ROWS", "WARPS", "map_tile", "slices", "stages", "tap", "vectors"]

# Compiled for Hopper in bf16, 12 or 16 heads of 32, the kernels take 166 to 205 registers and nothing spills; with 32
# rows, 32 keys or half the warps, one kernel or more does. Which is fastest has not been measured on a GPU.
ROWS = 16
KEYS = 16
WARPS = 8


def slices(wide: int, *tensors_BMNd: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same ``wide`` columns of each, as many as fit into registers, as kernels read them: views where possible."""
    yield from zip(*(readable(x_BMNd).split(wide, -1) for x_BMNd in tensors_BMNd), strict=True)


def stages(value_BMNd: Tensor) -> int:
    """Steps whose loads are under way at once: two where that fits into 160 KB of shared memory, an A100's."""
    return 2 if value_BMNd.element_size() == 2 and value_BMNd.shape[-1] <= 32 else 1


@triton.jit
def map_tile(map_HNN, head_H, row_R, key_K, strides, heads, tokens):
    """Maps of one image, [H, L], zero where there is none."""
    here_RK = ((row_R >= 0) & (row_R < tokens))[:, None] & (key_K < tokens)[None, :]
    here_HRK = (head_H < heads)[:, None, None] & here_RK[None, :, :]
    place_RK = row_R[:, None] * strides[2] + key_K[None, :] * strides[3]
    head_H11 = map_HNN + head_H[:, None, None] * strides[1]
    tile_HRK = tl.load(head_H11 + place_RK[None, :, :], mask=here_HRK, other=0.0)
    return tl.reshape(tile_HRK, [head_H.shape[0], row_R.shape[0] * key_K.shape[0]])


@triton.jit
def vectors(x_MNd, plane_M, here_M, token_R, strides, tokens, width, WIDTH: tl.constexpr):
    """Some tokens' vectors of one image, [M, R, WIDTH], zero where there is none; ``plane_M`` says whose."""
    at_d = tl.arange(0, WIDTH)
    here_MR = here_M[:, None] & ((token_R >= 0) & (token_R < tokens))[None, :]
    here_MRd = here_MR[:, :, None] & (at_d < width)[None, None, :]
    token_MR1 = x_MNd + plane_M[:, None, None] * strides[1] + token_R[None, :, None] * strides[2]
    return tl.load(token_MR1 + at_d[None, None, :], mask=here_MRd, other=0.0)


@triton.jit
def tap(kernel_MHkk, map_, head, maps, heads, row, column, TAPS: tl.constexpr):
    """One tap of the kernel, zero for maps and heads that are none; ``map_`` and ``head`` say how it lies."""
    place = ((map_ * heads + head) * TAPS + row) * TAPS + column
    return tl.load(kernel_MHkk + place, mask=(map_ < maps) & (head < heads), other=0.0)
