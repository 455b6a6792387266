"""What the kernels share. Small matrices of weights are fp32, sums are fp32, maps are whatever they are stored in.

``mix`` is for the few heads: exact to fp32's last bits on tensor cores, by three products in tf32; ``mix_stored`` for
maps that are as they are stored. ``product`` is for long sums of stored numbers: half precision multiplies as it is,
fp32 as ``mix`` does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.fused.launching import INTERPRETED

__all__ = ["at_least_16", "in_two", "mix", "mix_stored", "nine", "product", "readable", "relu6"]

_INTERPRETED = tl.constexpr(INTERPRETED)


def at_least_16(count: int) -> int:
    """The next power of two that tensor cores multiply: heads, maps and head widths are padded to it."""
    return max(16, triton.next_power_of_2(count))


def readable(x_BHNd: Tensor) -> Tensor:
    """The same numbers with a head's width in one piece, as kernels read them; heads may lie anywhere."""
    return x_BHNd if x_BHNd.stride(-1) == 1 else x_BHNd.contiguous()


@triton.jit
def mix(weight, maps):
    """weight [M, C] · maps [C, L] in fp32."""
    return tl.dot(weight.to(tl.float32), maps.to(tl.float32), input_precision="tf32x3")


@triton.jit
def product(left, right):
    """left · right, sums in fp32; both in the same dtype. The interpreter multiplies bfloat16 as integers: not here."""
    if _INTERPRETED or left.dtype == tl.float32:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(left, right)


@triton.jit
def mix_stored(weight, maps, sums):
    """sums + weight [M, C] in fp32 · maps [C, L] as they are stored.

    For half precision the weight goes in two pieces: twice the digits for a third of the time that ``mix`` takes.
    """
    if maps.dtype == tl.float32:
        sums += mix(weight, maps)
    else:
        coarse = weight.to(maps.dtype)
        sums += product(coarse, maps)
        sums += product((weight - coarse.to(tl.float32)).to(maps.dtype), maps)
    return sums


@triton.jit
def nine(taps_E9, map_M, real_M):
    """The nine taps of some maps' local kernels, each [M, 1]; zero where there is no map."""
    taps = tl.tuple(())
    for tap in tl.static_range(9):
        taps += (tl.load(taps_E9 + map_M * 9 + tap, mask=real_M, other=0.0)[:, None],)
    return taps


@triton.jit
def in_two(x, DTYPE: tl.constexpr):
    """fp32 numbers as the sum of two in half precision, which has more than twice its digits."""
    if DTYPE == tl.bfloat16:
        # The upper half of an fp32 number is a bfloat16: cheaper than rounding and going back.
        coarse = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        coarse = x.to(DTYPE).to(tl.float32)
    return coarse.to(DTYPE), (x - coarse).to(DTYPE)


@triton.jit
def relu6(x):
    """min(max(x, 0), 6)."""
    return tl.minimum(tl.maximum(x, 0.0), 6.0)
