"""Mean and covariance of attention maps over heads, in one pass over them.

    each program: some positions of one image ──> mean and comoment about that mean ──> combined in float64

Axes: B batch, H heads, N tokens, L positions of a program's step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.dot import dot, dot_fp32, padded_size, split_hi_lo
from refiner_ds.attention.kernels.launch import launch
from refiner_ds.attention.kernels.padded import row_stride, to_padded, valid_counts
from refiner_ds.attention.moments import combine

__all__ = ["map_moments"]

POSITIONS = 64  # of a step
STEPS = 64  # of a program, which is one warp: there is a single tile of a product


@triton.jit
def _maps_at(row_H1, offset_L, head_H, heads, TOKENS: tl.constexpr, STRIDE: tl.constexpr):
    """Maps at some offsets, [H, L] in fp32, zero outside; and which of the offsets are not padding, [L]."""
    stored_L = offset_L < TOKENS * STRIDE
    map_HL = tl.load(row_H1 + offset_L[None, :], mask=(head_H < heads)[:, None] & stored_L[None, :], other=0.0)
    return map_HL.to(tl.float32), stored_L & (offset_L % STRIDE < TOKENS)


@triton.jit
def _map_moments(
    map_BHNN, means_PH, comoments_PHH, counts_P, heads,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, POSITIONS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(0), tl.program_id(1)
    head_H, lane_L = tl.arange(0, PADDED), tl.arange(0, POSITIONS)
    start = part * STEPS * POSITIONS
    row_H1 = map_BHNN + (image.to(tl.int64) * heads + head_H[:, None]) * (TOKENS * STRIDE)
    # Sums about a value near the mean keep fp32's digits; the mean of the first step is near enough.
    first_HL, mask_L = _maps_at(row_H1, start + lane_L, head_H, heads, TOKENS, STRIDE)
    pilot_H = tl.sum(first_HL, 1) / tl.sum(mask_L.to(tl.float32), 0)
    sum_HL = tl.zeros([PADDED, POSITIONS], dtype=tl.float32)
    square_HH, cross_HH = tl.zeros([PADDED, PADDED], dtype=tl.float32), tl.zeros([PADDED, PADDED], dtype=tl.float32)
    for step in range(STEPS):
        map_HL, mask_L = _maps_at(row_H1, start + step * POSITIONS + lane_L, head_H, heads, TOKENS, STRIDE)
        centred_HL = tl.where(mask_L[None, :], map_HL - pilot_H[:, None], 0.0)
        sum_HL += centred_HL
        if map_BHNN.dtype.element_ty == tl.float32:
            square_HH += dot_fp32(centred_HL, tl.trans(centred_HL))
        else:
            # The product of the two low parts is below fp32's last digit.
            high_HL, low_HL = split_hi_lo(centred_HL, map_BHNN.dtype.element_ty)
            square_HH += dot(high_HL, tl.trans(high_HL))
            cross_HH += dot(high_HL, tl.trans(low_HL))
    count = tl.load(counts_P + part)
    sum_H = tl.sum(sum_HL, 1)
    mean_H = sum_H / count
    square_HH += cross_HH + tl.trans(cross_HH) - sum_H[:, None] * mean_H[None, :]
    program = image * tl.num_programs(1) + part
    tl.store(means_PH + program * PADDED + head_H, pilot_H + mean_H)
    entry_HH = head_H[:, None] * PADDED + head_H[None, :]
    tl.store(comoments_PHH + program.to(tl.int64) * PADDED * PADDED + entry_HH, square_HH)


def map_moments(map_BHNN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of maps over heads, [H] and [H, H], float64.

    Args:
        map_BHNN: maps, fp32 or half precision.
    """
    map_BHNN = to_padded(map_BHNN)
    batch, heads, tokens, _ = map_BHNN.shape
    padded, counts_P = padded_size(heads), valid_counts(tokens, STEPS * POSITIONS, map_BHNN.device)
    parts = len(counts_P)
    means_PH = map_BHNN.new_empty(batch * parts, padded, dtype=torch.float32)
    comoments_PHH = map_BHNN.new_empty(batch * parts, padded, padded, dtype=torch.float32)
    launch(
        _map_moments, (batch, parts), map_BHNN, means_PH, comoments_PHH, counts_P, heads,
        TOKENS=tokens, STRIDE=row_stride(tokens), PADDED=padded, POSITIONS=POSITIONS, STEPS=STEPS, num_warps=1,
    )  # fmt: skip
    mean_H, covariance_HH = combine(counts_P.repeat(batch), means_PH, comoments_PHH)
    return mean_H[:heads], covariance_HH[:heads, :heads]
