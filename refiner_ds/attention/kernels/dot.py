"""Products in kernels, and their precision. Weights and sums are fp32, maps are whatever they are stored in.

dot                two tensors as they are stored, for long sums; fp32 as in dot_fp32
dot_fp32           fp32 weights with maps taken to fp32, exact to fp32's last bits: three tf32 products on Nvidia's
                   tensor cores; AMD's multiply fp32 itself, and Triton knows no tf32x3 there
dot_split_weight   fp32 weights, split in two halves, with maps as they are stored
zero_sums, as_sum  numbers in the precision of sums

In the interpreter maps may be float64, and then weights and sums are: what kernels compute can be proven to rounding.
On a GPU they would be slow at no use, and float64 is left to tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from refiner_ds.attention.kernels.launch import INTERPRETED

__all__ = [
    "as_sum",
    "dense_rows",
    "dot",
    "dot_fp32",
    "dot_split_weight",
    "load_taps",
    "padded_size",
    "relu6",
    "split_hi_lo",
    "zero_sums",
]

_INTERPRETED = tl.constexpr(INTERPRETED)


def padded_size(count: int) -> int:
    """The next power of two, 16 or more, to which heads, maps and head widths are padded for tensor cores."""
    return max(16, triton.next_power_of_2(count))


def dense_rows(x_BHNd: Tensor) -> Tensor:
    """The same numbers with the last axis contiguous, as kernels read them; the others may have any stride."""
    return x_BHNd if x_BHNd.stride(-1) == 1 else x_BHNd.contiguous()


@triton.jit
def zero_sums(shape, DTYPE: tl.constexpr):
    """Zeros to which products of numbers of a dtype are added: fp32, or float64."""
    if DTYPE == tl.float64:
        return tl.zeros(shape, tl.float64)
    else:
        return tl.zeros(shape, tl.float32)


@triton.jit
def as_sum(x):
    """Numbers in the precision of sums."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def dot_fp32(weight, maps):
    """weight [M, C] · maps [C, L] in fp32, or float64."""
    if maps.dtype == tl.float64:
        return tl.dot(weight.to(tl.float64), maps, input_precision="ieee", out_dtype=tl.float64)
    elif is_hip():
        return tl.dot(weight.to(tl.float32), maps.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(weight.to(tl.float32), maps.to(tl.float32), input_precision="tf32x3")


@triton.jit
def dot(left, right):
    """left · right, both in one dtype, sums in fp32. The interpreter's own product takes bf16 for integers."""
    if _INTERPRETED or left.dtype == tl.float32:
        return dot_fp32(left, right)
    else:
        return tl.dot(left, right)


@triton.jit
def dot_split_weight(weight, maps, sums):
    """sums + weight [M, C] in fp32 · maps [C, L] as they are stored.

    With maps in half precision the weight is split in two: twice the digits, in a third of ``dot_fp32``'s time.
    """
    if maps.dtype == tl.float32 or maps.dtype == tl.float64:
        sums += dot_fp32(weight, maps)
    else:
        high = weight.to(maps.dtype)
        sums += dot(high, maps)
        sums += dot((weight - high.to(tl.float32)).to(maps.dtype), maps)
    return sums


@triton.jit
def load_taps(taps_E9, map_M, mask_M):
    """The nine taps of some maps' 3×3 kernels, each [M, 1]; zero where there is no map."""
    taps = tl.tuple(())
    for tap in tl.static_range(9):
        taps += (tl.load(taps_E9 + map_M * 9 + tap, mask=mask_M, other=0.0)[:, None],)
    return taps


@triton.jit
def split_hi_lo(x, DTYPE: tl.constexpr):
    """fp32 numbers as the sum of two in half precision: twice its digits and more."""
    if DTYPE == tl.bfloat16:
        # The upper half of an fp32 number is a bfloat16: cheaper than rounding and going back.
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        high = x.to(DTYPE).to(tl.float32)
    return high.to(DTYPE), (x - high).to(DTYPE)


@triton.jit
def relu6(x):
    """min(max(x, 0), 6)."""
    return tl.minimum(tl.maximum(x, 0.0), 6.0)
