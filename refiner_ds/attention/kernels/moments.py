"""Mean and covariance of attention maps over heads, in one pass over them.

    each program: some positions of one image ──> mean and comoment about that mean ──> combined in float64

Axes: B batch, H heads, N tokens, L positions of a program's step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.dot import as_sum, dot, dot_fp32, padded_size, split_hi_lo, zero_sums
from refiner_ds.attention.kernels.launch import launch
from refiner_ds.attention.kernels.masks import count_of, real_entries
from refiner_ds.attention.kernels.padded import part_counts, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.moments import combine
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["map_moments"]

POSITIONS = 64  # of a step
STEPS = 64  # of a program, which is one warp: there is a single tile of a product


@triton.jit
def _maps_at(
    row_H1, offset_L, head_H, heads, mask_BN, image, TOKENS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr
):
    """Maps at some offsets, [H, L] in fp32 or float64, zero outside; and which of the offsets are real entries, [L]."""
    stored_L = offset_L < TOKENS * STRIDE
    stored_HL = (head_H < heads)[:, None] & stored_L[None, :]
    map_HL = as_sum(tl.load(row_H1 + offset_L[None, :], mask=stored_HL, other=0.0))
    valid_L = stored_L & (offset_L % STRIDE < TOKENS)
    if MASKED:
        valid_L = real_entries(mask_BN, image, offset_L, valid_L, TOKENS, STRIDE)
    return map_HL, valid_L


@triton.jit
def _map_moments(
    map_BHNN, means_PH, comoments_PHH, counts_P, heads, first_P, mask_BN,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, POSITIONS: tl.constexpr, STEPS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(0), tl.program_id(1)
    head_H, lane_L = tl.arange(0, PADDED), tl.arange(0, POSITIONS)
    start = part * STEPS * POSITIONS
    counted, first = part, start
    if MASKED:
        # Counts are each image's own, and a part may begin with padding.
        counted = image * tl.num_programs(1) + part
        first += tl.load(first_P + counted).to(tl.int32) * POSITIONS
    row_H1 = map_BHNN + (image.to(tl.int64) * heads + head_H[:, None]) * (TOKENS * STRIDE)
    # Sums about a value near the mean keep fp32's digits; the mean of the first step is near enough.
    first_HL, mask_L = _maps_at(row_H1, first + lane_L, head_H, heads, mask_BN, image, TOKENS, STRIDE, MASKED)
    pilot_H = tl.sum(first_HL, 1) / count_of(tl.sum(mask_L.to(tl.float32), 0), MASKED)
    sum_HL = zero_sums([PADDED, POSITIONS], map_BHNN.dtype.element_ty)
    square_HH = zero_sums([PADDED, PADDED], map_BHNN.dtype.element_ty)
    cross_HH = zero_sums([PADDED, PADDED], map_BHNN.dtype.element_ty)
    for step in range(STEPS):
        offset_L = start + step * POSITIONS + lane_L
        map_HL, mask_L = _maps_at(row_H1, offset_L, head_H, heads, mask_BN, image, TOKENS, STRIDE, MASKED)
        centred_HL = tl.where(mask_L[None, :], map_HL - pilot_H[:, None], 0.0)
        sum_HL += centred_HL
        if map_BHNN.dtype.element_ty == tl.float32 or map_BHNN.dtype.element_ty == tl.float64:
            square_HH += dot_fp32(centred_HL, tl.trans(centred_HL))
        else:
            # The product of the two low parts is below fp32's last digit.
            high_HL, low_HL = split_hi_lo(centred_HL, map_BHNN.dtype.element_ty)
            square_HH += dot(high_HL, tl.trans(high_HL))
            cross_HH += dot(high_HL, tl.trans(low_HL))
    count = count_of(tl.load(counts_P + counted), MASKED)
    sum_H = tl.sum(sum_HL, 1)
    mean_H = sum_H / count
    square_HH += cross_HH + tl.trans(cross_HH) - sum_H[:, None] * mean_H[None, :]
    program = image * tl.num_programs(1) + part
    tl.store(means_PH + program * PADDED + head_H, pilot_H + mean_H)
    entry_HH = head_H[:, None] * PADDED + head_H[None, :]
    tl.store(comoments_PHH + program.to(tl.int64) * PADDED * PADDED + entry_HH, square_HH)


def map_moments(map_BHNN: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of maps over heads, [H] and [H, H], float64.

    Args:
        map_BHNN: maps, fp32 or half precision, in the interpreter float64 too.
        mask_BN: which tokens are real, bool; maps of the others are zero, and not counted.
    """
    map_BHNN = to_padded(map_BHNN)
    batch, heads, tokens, _ = map_BHNN.shape
    padded, precision, stride = padded_size(heads), statistics_dtype(map_BHNN.dtype), row_stride(tokens)
    parts = triton.cdiv(tokens * stride, STEPS * POSITIONS)
    counts_P, first_P = part_counts(map_BHNN, mask_BN, POSITIONS, STEPS)
    means_PH = map_BHNN.new_empty(batch * parts, padded, dtype=precision)
    comoments_PHH = map_BHNN.new_empty(batch * parts, padded, padded, dtype=precision)
    launch(
        _map_moments, (batch, parts), map_BHNN, means_PH, comoments_PHH, counts_P, heads, first_P,
        counts_P if mask_BN is None else mask_bytes(mask_BN),
        TOKENS=tokens, STRIDE=stride, PADDED=padded, POSITIONS=POSITIONS, STEPS=STEPS,
        MASKED=mask_BN is not None, num_warps=1,
    )  # fmt: skip
    counts_P = counts_P.repeat(batch) if mask_BN is None else counts_P
    mean_H, covariance_HH = combine(counts_P, means_PH, comoments_PHH)
    return mean_H[:heads], covariance_HH[:heads, :heads]
