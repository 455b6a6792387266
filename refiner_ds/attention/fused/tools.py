"""What the kernels share. Small matrices of weights are fp32, sums are fp32, maps are whatever they are stored in.

``mix`` is for the few heads: exact to fp32's last bits on tensor cores, by three products in tf32. ``product`` is for
long sums of stored numbers: half precision multiplies as it is, fp32 as ``mix`` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refiner_ds.attention.fused.launching import INTERPRETED

__all__ = ["at_least_16", "mix", "product", "relu6"]

_INTERPRETED = tl.constexpr(INTERPRETED)


def at_least_16(count: int) -> int:
    """The next power of two that tensor cores multiply: heads, maps and head widths are padded to it."""
    return max(16, triton.next_power_of_2(count))


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
def relu6(x):
    """min(max(x, 0), 6)."""
    return tl.minimum(tl.maximum(x, 0.0), 6.0)
