"""The forward passes of the released refiner in training by three kernels; the caller folds the norms between them.

    1  expand_local   A     ──> h2, its mean and variance      u1 = relu6(E₁·A + shift1), h2 = kernel ∗ u1
    2  reduce         h2, A ──> h3, its moments with A         u2 = relu6(gain2·h2 + shift2), h3 = R·u2
    3  output         h3, A ──> out                            out = T·V, T = α·h3 + β·A + γ

u1 and u2 exist in registers only, clipped to [0, 1] instead of [0, 6], which a multiplication does for nothing; the six
goes into the weights after them.

Axes: B batch, H heads, E expanded maps, N tokens, d head width, M expanded maps of a group, L columns or positions of a
tile, Q its halo (see kernels/fragments.py), R query rows and C keys of a tile, P programs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.configurations import sizes_of
from refiner_ds.attention.kernels.dot import (
    as_sum,
    dense_rows,
    dot,
    dot_split_weight,
    load_taps,
    padded_size,
    split_hi_lo,
    zero_sums,
)
from refiner_ds.attention.kernels.fragments import FRAGMENTS, fragment_offsets, halo_offsets, neighbours
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.masks import count_of, real_entries, real_tokens
from refiner_ds.attention.kernels.padded import empty_padded, part_counts, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.moments import combine_each
from refiner_ds.attention.norms import statistics_dtype

__all__ = [
    "expand_local",
    "groups_of",
    "dot_split_both",
    "nan_unless_finite",
    "pad_to_nine_taps",
    "output",
    "reduce",
    "relu6_unit",
]

GROUP = 16  # expanded maps at a time: the rows of one product on tensor cores
KEYS = 8  # of a fragment of expand_local: 20 products for 16 columns of output, in 168 registers
SEGMENT = 48  # rows of a program of expand_local, approximately; it computes two more
POSITIONS, STEPS, WARPS = 32, 32, 2  # of a step of reduce, steps of a program, and its warps
ROWS, COLUMNS = 64, 32  # of a tile of output: the fewest rows that warp-group products take, in 106 registers


# -- 1: expansion and local attention --------------------------------------------------------------------------------


@triton.jit
def _expanded_row(
    map_L, map_Q, row, stored_L, valid_L, valid_Q, image_L, image_Q, mask_BN, head_H, folded_MH, shift_M1,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A row of u1 and its neighbours at the key before and after: every row of h2 needs three of these, read once."""
    row_L, row_Q = tl.where(stored_L, row, -1), tl.where(valid_Q, row, -1)
    in_L, in_Q = (row_L >= 0) & (row_L < TOKENS), (row_Q >= 0) & (row_Q < TOKENS)
    if MASKED:  # padding is outside the map
        in_L = real_tokens(mask_BN, image_L, row, in_L, TOKENS)
        in_Q = real_tokens(mask_BN, image_Q, row, in_Q, TOKENS)
    mask_H1, plane_H1 = (head_H < HEADS)[:, None], (head_H * (TOKENS * STRIDE))[:, None]
    map_HL = tl.load((map_L + row * STRIDE)[None, :] + plane_H1, mask=in_L[None, :] & mask_H1, other=0.0)
    map_HQ = tl.load((map_Q + row * STRIDE)[None, :] + plane_H1, mask=in_Q[None, :] & mask_H1, other=0.0)
    u1_ML = relu6_unit(folded_MH, map_HL, shift_M1, in_L & valid_L)
    left_ML, right_ML = neighbours(u1_ML, relu6_unit(folded_MH, map_HQ, shift_M1, in_Q), GROUP, KEYS)
    return left_ML, u1_ML, right_ML


@triton.jit
def _store_moments(
    part_M, mask_M, valid_L, count, pilot_M1, sum_ML, square_ML, EXPANDED: tl.constexpr, MASKED: tl.constexpr
):
    """Count, mean and comoment of h2, from sums about a pilot, as one program's row of [P, 3, E]."""
    mean_M = tl.sum(tl.where(valid_L[None, :], sum_ML, 0.0), 1) / count_of(count, MASKED)
    comoment_M = tl.sum(tl.where(valid_L[None, :], square_ML, 0.0), 1) - mean_M * mean_M * count
    tl.store(part_M, count + 0.0 * mean_M, mask=mask_M)
    tl.store(part_M + EXPANDED, tl.sum(pilot_M1, 1) + mean_M, mask=mask_M)
    tl.store(part_M + 2 * EXPANDED, comoment_M, mask=mask_M)


@triton.jit
def _expand_local(
    map_BHNN, folded_EH, shift_E, taps_E9, local_BENN, parts_P3E, fragments, mask_BN,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, EXPANDED: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    tile, segment = tl.program_id(1), tl.program_id(2)
    # The last group may overlap the one before: both then write the same numbers.
    start = tl.minimum(tl.program_id(0) * SIZE, EXPANDED - SIZE)
    head_H, offset_M = tl.arange(0, PADDED), tl.arange(0, GROUP)
    mask_M, map_M = offset_M < SIZE, start + offset_M
    entry_MH = map_M[:, None] * HEADS + head_H[None, :]
    folded_MH = tl.load(folded_EH + entry_MH, mask=mask_M[:, None] & (head_H[None, :] < HEADS), other=0.0)
    shift_M1 = tl.load(shift_E + map_M, mask=mask_M, other=0.0)[:, None]
    taps = load_taps(taps_E9, map_M, mask_M)
    image_L, key_L, stored_L, valid_L = fragment_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    image_Q, key_Q, valid_Q = halo_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    if MASKED:
        valid_L = real_tokens(mask_BN, image_L, key_L, valid_L, TOKENS)
        valid_Q = real_tokens(mask_BN, image_Q, key_Q, valid_Q, TOKENS)
    AREA: tl.constexpr = TOKENS * STRIDE
    map_L, map_Q = map_BHNN + image_L * (HEADS * AREA) + key_L, map_BHNN + image_Q * (HEADS * AREA) + key_Q
    local_L = local_BENN + (image_L * EXPANDED + start) * AREA + key_L
    empty_ML = zero_sums([GROUP, 4 * KEYS], map_BHNN.dtype.element_ty)
    # Partial sums of h2 for the row before the one just read, and for that row, from the rows above.
    before_ML, now_ML = empty_ML, empty_ML
    sum_ML, square_ML = empty_ML, empty_ML
    pilot_M1, count = tl.sum(empty_ML, 1)[:, None], 0.0
    first = segment * ROWS
    for step in range(ROWS + 2):
        row = first + step - 1
        left_ML, u1_ML, right_ML = _expanded_row(
            map_L, map_Q, row, stored_L, valid_L, valid_Q, image_L, image_Q, mask_BN, head_H, folded_MH, shift_M1,
            TOKENS, STRIDE, HEADS, GROUP, KEYS, MASKED,
        )  # fmt: skip
        h2_ML = before_ML + taps[6] * left_ML + taps[7] * u1_ML + taps[8] * right_ML
        before_ML = now_ML + taps[3] * left_ML + taps[4] * u1_ML + taps[5] * right_ML
        now_ML = taps[0] * left_ML + taps[1] * u1_ML + taps[2] * right_ML
        if (step >= 2) & (row <= TOKENS):
            real_L, is_first = valid_L, step == 2
            if MASKED:
                real_L = real_tokens(mask_BN, image_L, row - 1, valid_L, TOKENS)
                is_first = count == 0.0
                count += tl.sum(real_L.to(tl.float32), 0)
            if is_first:
                pilot_M = tl.sum(tl.where(real_L[None, :], h2_ML, 0.0), 1)
                pilot_M1 = (pilot_M / count_of(tl.sum(real_L.to(tl.float32), 0), MASKED))[:, None]
            centred_ML = h2_ML - pilot_M1
            if MASKED:
                centred_ML = tl.where(real_L[None, :], centred_ML, 0.0)
            sum_ML += centred_ML
            square_ML += centred_ML * centred_ML
            tl.store(
                (local_L + (row - 1) * STRIDE)[None, :] + (offset_M * AREA)[:, None],
                tl.where(real_L[None, :], h2_ML, 0.0).to(local_BENN.dtype.element_ty),
                mask=stored_L[None, :] & mask_M[:, None],
            )  # fmt: skip
    part_M = parts_P3E + (tile * tl.num_programs(2) + segment) * (3 * EXPANDED) + map_M
    if not MASKED:
        rows = tl.minimum(TOKENS - first, ROWS)
        count = tl.sum(valid_L.to(tl.float32), 0) * rows
    _store_moments(part_M, mask_M, valid_L, count, pilot_M1, sum_ML, square_ML, EXPANDED, MASKED)


@triton.jit
def relu6_unit(folded_MH, map_HL, shift_M1, in_L):
    """A sixth of u1, [M, L], from a sixth of the weights. Outside the map it is 0, not relu6(shift)."""
    sums_ML = zero_sums([folded_MH.shape[0], map_HL.shape[1]], map_HL.dtype)
    return tl.clamp(dot_split_weight(folded_MH, map_HL, sums_ML) + shift_M1 * in_L.to(tl.float32)[None, :], 0.0, 1.0)


def expand_local(
    map_BHNN: Tensor, folded_EH: Tensor, shift1_E: Tensor, kernel_E1kk: Tensor, mask_BN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Expansion with norm 1 folded into it, clip, and distributed local attention.

    Reads 2 bytes an entry of the map (in half precision; the groups of expanded maps share the cache) and writes 2
    for each of the E / H expanded ones.

    Args:
        map_BHNN: maps.
        folded_EH, shift1_E: weight and bias of the expansion, norm 1 included.
        kernel_E1kk: kernels of size 1 or 3.
        mask_BN: which tokens are real, bool.
    Returns:
        h2, [B, E, N, N] in the maps' dtype, zero for padding; its mean and biased variance before rounding, [E],
        float64.
    """
    map_BHNN, precision = to_padded(map_BHNN), statistics_dtype(map_BHNN.dtype)
    batch, heads, tokens, _ = map_BHNN.shape
    expanded, stride = folded_EH.shape[0], row_stride(tokens)
    groups, size = groups_of(expanded)
    sizes = sizes_of("expand_local", architecture(map_BHNN.device), KEYS=KEYS, SEGMENT=SEGMENT)
    fragments = batch * stride // sizes["KEYS"]
    rows = triton.cdiv(tokens, max(1, round(tokens / sizes["SEGMENT"])))
    tiles, segments = triton.cdiv(fragments, FRAGMENTS), triton.cdiv(tokens, rows)
    local_BENN = empty_padded(map_BHNN, expanded)
    parts_P3E = map_BHNN.new_empty(tiles * segments, 3, expanded, dtype=precision)
    taps_E9 = 6 * pad_to_nine_taps(kernel_E1kk, precision) + nan_unless_finite(folded_EH.sum(1), shift1_E)[:, None]
    launch(
        _expand_local, (groups, tiles, segments), map_BHNN, _sixth(folded_EH, precision), _sixth(shift1_E, precision),
        taps_E9, local_BENN, parts_P3E, fragments, taps_E9 if mask_BN is None else mask_bytes(mask_BN),
        TOKENS=tokens, STRIDE=stride, HEADS=heads, EXPANDED=expanded, SIZE=size, PADDED=padded_size(heads), GROUP=GROUP,
        KEYS=sizes["KEYS"], ROWS=rows, MASKED=mask_BN is not None, num_warps=1,
    )  # fmt: skip
    mean_1E, variance_11E = combine_each(parts_P3E[:, 0], parts_P3E[:, 1:2], parts_P3E[:, 2:, None])
    return local_BENN, mean_1E[0], variance_11E[0, 0]


def groups_of(expanded: int) -> tuple[int, int]:
    """The number and size of the groups of expanded maps, as even as possible."""
    groups = triton.cdiv(expanded, GROUP)
    return groups, triton.cdiv(expanded, groups)


def pad_to_nine_taps(kernel_E1kk: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Kernels of size 1 or 3 as 3×3 ones, [E, 9]."""
    margin = (3 - kernel_E1kk.shape[-1]) // 2
    return F.pad(kernel_E1kk.to(dtype), (margin,) * 4).flatten(1).contiguous()


def nan_unless_finite(*parts_E: Tensor) -> Tensor:
    """0 for maps all of whose numbers here are finite, otherwise NaN, [E], fp32.

    Clips in kernels turn NaN into 0; added to the weights after a clip, this propagates what the clip would hide.
    """
    return sum((part_E.float() for part_E in parts_E), start=parts_E[0].new_zeros((), dtype=torch.float32)) * 0.0


def _sixth(weight: Tensor, precision: torch.dtype) -> Tensor:
    return weight.to(precision).contiguous() / 6


# -- 2: reduction ----------------------------------------------------------------------------------------------------


@triton.jit
def dot_split_both(weight_HM, maps_ML, sums_HL, DTYPE: tl.constexpr):
    """sums + weight · maps in registers, both fp32; where maps are stored in half precision both are split in two.

    Three products keep 16 bits, far more than the result is stored in.
    """
    if DTYPE == tl.float32 or DTYPE == tl.float64:
        sums_HL = dot_split_weight(weight_HM, maps_ML, sums_HL)
    else:
        high_ML, low_ML = split_hi_lo(maps_ML, DTYPE)
        sums_HL = dot_split_weight(weight_HM, high_ML, sums_HL)
        sums_HL += dot(weight_HM.to(DTYPE), low_ML)
    return sums_HL


@triton.jit
def _load_groups(
    affine_2E, reduce_HE, head_H, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Norm 2's gain and shift and the reduction of every group: all positions of a program use them from registers."""
    offset_M, mask_H = tl.arange(0, GROUP), head_H < HEADS
    gains, shifts, weights = tl.tuple(()), tl.tuple(()), tl.tuple(())
    for group in tl.static_range(GROUPS):
        # The last group may overlap the one before: zero weights keep its maps from counting twice.
        map_M = min(group * SIZE, EXPANDED - SIZE) + offset_M
        mask_M = (offset_M < SIZE) & (map_M >= group * SIZE)
        gains += (tl.load(affine_2E + map_M, mask=mask_M, other=0.0)[:, None],)
        shifts += (tl.load(affine_2E + EXPANDED + map_M, mask=mask_M, other=0.0)[:, None],)
        entry_HM = head_H[:, None] * EXPANDED + map_M[None, :]
        weights += (tl.load(reduce_HE + entry_HM, mask=mask_H[:, None] & mask_M[None, :], other=0.0),)
    return gains, shifts, weights


@triton.jit
def _reduced(
    local_L, stored_1L, gains, shifts, weights, PADDED: tl.constexpr, AREA: tl.constexpr, EXPANDED: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h3 at some positions, [H, L] in fp32 or float64: u2 of each group is made, multiplied and forgotten."""
    offset_M = tl.arange(0, GROUP)
    stored_ML = stored_1L & (offset_M < SIZE)[:, None]
    h3_HL = zero_sums([PADDED, local_L.shape[0]], local_L.dtype.element_ty)
    for group in tl.static_range(GROUPS):
        local_1L = (local_L + min(group * SIZE, EXPANDED - SIZE) * AREA)[None, :]
        h2_ML = tl.load(local_1L + (offset_M * AREA)[:, None], mask=stored_ML, other=0.0)
        u2_ML = tl.clamp(as_sum(h2_ML) * gains[group] + shifts[group], 0.0, 1.0)
        h3_HL = dot_split_both(weights[group], u2_ML, h3_HL, local_L.dtype.element_ty)
    return h3_HL


@triton.jit
def _reduce(
    local_BENN, map_BHNN, affine_2E, reduce_HE, reduced_BHNN, parts_P6H, counts_P, first_P, mask_BN,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, POSITIONS: tl.constexpr, STEPS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    counted, first = part, 0
    if MASKED:
        # Counts are each image's own, and a part may begin with padding.
        counted = image * tl.num_programs(1) + part
        first = tl.load(first_P + counted)
    head_H, lane_L = tl.arange(0, PADDED), tl.arange(0, POSITIONS)
    mask_H = head_H < HEADS
    gains, shifts, weights = _load_groups(affine_2E, reduce_HE, head_H, HEADS, EXPANDED, GROUPS, SIZE, GROUP)
    AREA: tl.constexpr = TOKENS * STRIDE
    start = part * STEPS * POSITIONS
    empty_HL = zero_sums([PADDED, POSITIONS], map_BHNN.dtype.element_ty)
    sum3_HL, sum_HL, square3_HL, cross_HL, square_HL = empty_HL, empty_HL, empty_HL, empty_HL, empty_HL
    pilot3_H1, pilot_H1 = tl.sum(empty_HL, 1)[:, None], tl.sum(empty_HL, 1)[:, None]
    local_L = local_BENN + image * (EXPANDED * AREA) + start + lane_L
    map_L = map_BHNN + image * (HEADS * AREA) + start + lane_L
    reduced_L = reduced_BHNN + image * (HEADS * AREA) + start + lane_L
    for step in range(STEPS):
        offset_L = start + step * POSITIONS + lane_L
        stored_1L, valid_1L = (offset_L < AREA)[None, :], ((offset_L < AREA) & (offset_L % STRIDE < TOKENS))[None, :]
        if MASKED:
            valid_1L = real_entries(mask_BN, image, offset_L[None, :], valid_1L, TOKENS, STRIDE)
        stored_HL = stored_1L & mask_H[:, None]
        map_HL = as_sum(tl.load(map_L[None, :] + (head_H * AREA)[:, None], mask=stored_HL, other=0.0))
        h3_HL = _reduced(local_L, stored_1L, gains, shifts, weights, PADDED, AREA, EXPANDED, GROUPS, SIZE, GROUP)
        rounded_HL = tl.where(valid_1L, h3_HL, 0.0).to(reduced_BHNN.dtype.element_ty)
        tl.store(reduced_L[None, :] + (head_H * AREA)[:, None], rounded_HL, mask=stored_HL)
        local_L += POSITIONS
        map_L += POSITIONS
        reduced_L += POSITIONS
        if step == first:
            count = count_of(tl.sum(valid_1L.to(tl.float32), 1)[:, None], MASKED)
            pilot3_H1 = tl.sum(tl.where(valid_1L, h3_HL, 0.0), 1)[:, None] / count
            pilot_H1 = tl.sum(map_HL, 1)[:, None] / count
        centred3_HL = tl.where(valid_1L, h3_HL - pilot3_H1, 0.0)
        centred_HL = tl.where(valid_1L, map_HL - pilot_H1, 0.0)
        sum3_HL += centred3_HL
        sum_HL += centred_HL
        square3_HL += centred3_HL * centred3_HL
        cross_HL += centred3_HL * centred_HL
        square_HL += centred_HL * centred_HL
    part_H = parts_P6H + (image * tl.num_programs(1) + part) * (6 * HEADS) + head_H
    count = tl.load(counts_P + counted).to(tl.float32)
    _store_joint(
        part_H, mask_H, HEADS, MASKED, count, pilot3_H1, pilot_H1, tl.sum(sum3_HL, 1), tl.sum(sum_HL, 1),
        tl.sum(square3_HL, 1), tl.sum(cross_HL, 1), tl.sum(square_HL, 1),
    )  # fmt: skip


@triton.jit
def _store_joint(
    part_H, mask_H, HEADS: tl.constexpr, MASKED: tl.constexpr, count, pilot3_H1, pilot_H1, sum3_H, sum_H, square3_H,
    cross_H, square_H,
):  # fmt: skip
    """Count, the means of h3 and A, and their comoments, from sums about pilots, as one program's row of [P, 6, H]."""
    mean3_H, mean_H = sum3_H / count_of(count, MASKED), sum_H / count_of(count, MASKED)
    tl.store(part_H, count + 0.0 * mean_H, mask=mask_H)
    tl.store(part_H + HEADS, tl.sum(pilot3_H1, 1) + mean3_H, mask=mask_H)
    tl.store(part_H + 2 * HEADS, tl.sum(pilot_H1, 1) + mean_H, mask=mask_H)
    tl.store(part_H + 3 * HEADS, square3_H - sum3_H * mean3_H, mask=mask_H)
    tl.store(part_H + 4 * HEADS, cross_H - sum3_H * mean_H, mask=mask_H)
    tl.store(part_H + 5 * HEADS, square_H - sum_H * mean_H, mask=mask_H)


def reduce(
    local_BENN: Tensor, map_BHNN: Tensor, gain2_E: Tensor, shift2_E: Tensor, reduce_HE: Tensor,
    mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Norm 2 and its clip, reduction, and the moments of the result that norms 3 and 4 need.

    Reads 2 bytes (in half precision) for each of the E / H + 1 entries of h2 and A, writes 2.

    Args:
        local_BENN, map_BHNN: h2 and the maps.
        gain2_E, shift2_E: norm 2 as an affine map.
        reduce_HE: the reduction.
        mask_BN: which tokens are real, bool; maps of the others are zero.
    Returns:
        h3, [B, H, N, N] in the maps' dtype, zero for padding; its mean before rounding, [H], and the covariance of h3
        and A within each head, [2, 2, H], float64.
    """
    local_BENN, map_BHNN, precision = to_padded(local_BENN), to_padded(map_BHNN), statistics_dtype(map_BHNN.dtype)
    batch, heads, tokens, _ = map_BHNN.shape
    expanded, stride = local_BENN.shape[1], row_stride(tokens)
    groups, size = groups_of(expanded)
    usual = {"POSITIONS": POSITIONS, "STEPS": STEPS, "num_warps": WARPS}
    sizes = sizes_of("reduce", architecture(map_BHNN.device), **usual)
    parts = triton.cdiv(tokens * stride, sizes["STEPS"] * sizes["POSITIONS"])
    counts_P, first_P = part_counts(map_BHNN, mask_BN, sizes["POSITIONS"], sizes["STEPS"])
    reduced_BHNN = empty_padded(map_BHNN)
    parts_P6H = map_BHNN.new_empty(batch * parts, 6, heads, dtype=precision)
    launch(
        _reduce, (batch, parts), local_BENN, map_BHNN, _sixth(torch.stack((gain2_E, shift2_E)), precision),
        6 * reduce_HE.to(precision).contiguous() + nan_unless_finite(gain2_E, shift2_E), reduced_BHNN, parts_P6H,
        counts_P, first_P, counts_P if mask_BN is None else mask_bytes(mask_BN),
        TOKENS=tokens, STRIDE=stride, HEADS=heads, EXPANDED=expanded, GROUPS=groups, SIZE=size,
        PADDED=padded_size(heads), GROUP=GROUP, MASKED=mask_BN is not None, **sizes,
    )  # fmt: skip
    return reduced_BHNN, *_joint_moments(parts_P6H)


def _joint_moments(parts_P6H: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of h3, [H], and the covariance of h3 and A, [2, 2, H], from what :func:`_store_joint` stored."""
    comoments_P22H = parts_P6H[:, [3, 4, 4, 5]].unflatten(1, (2, 2))
    mean_2H, joint_22H = combine_each(parts_P6H[:, 0], parts_P6H[:, 1:3], comoments_P22H)
    return mean_2H[0], joint_22H


# -- 3: affine map and dot with the values -----------------------------------------------------------------------


@triton.jit
def _output(
    reduced_BHNN, map_BHNN, affine_3H, value_BHNd, out_BHNd, image_stride, head_stride, token_stride,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    plane, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = plane % HEADS
    row_R, feature_d = part * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    value_1d = value_BHNd + plane // HEADS * image_stride + head * head_stride + feature_d[None, :]
    reduced_R1 = reduced_BHNN + plane * (TOKENS * STRIDE) + row_R[:, None] * STRIDE
    map_R1 = map_BHNN + plane * (TOKENS * STRIDE) + row_R[:, None] * STRIDE
    # T is affine in h3 and A: multiplied separately, nothing is rounded but what is stored.
    from_reduced_Rd = zero_sums([ROWS, PADDED], map_BHNN.dtype.element_ty)
    from_map_Rd = zero_sums([ROWS, PADDED], map_BHNN.dtype.element_ty)
    value_d = zero_sums([PADDED], map_BHNN.dtype.element_ty)
    for start in range(0, TOKENS, COLUMNS):
        key_C = start + tl.arange(0, COLUMNS)
        stored_RC = (row_R[:, None] < TOKENS) & (key_C[None, :] < STRIDE)
        valid_Cd = (key_C[:, None] < TOKENS) & (feature_d[None, :] < WIDTH)
        value_Cd = tl.load(value_1d + key_C[:, None] * token_stride, mask=valid_Cd, other=0.0)
        reduced_RC = tl.load(reduced_R1 + key_C[None, :], mask=stored_RC, other=0.0)
        map_RC = tl.load(map_R1 + key_C[None, :], mask=stored_RC, other=0.0)
        from_reduced_Rd += dot(reduced_RC, value_Cd)
        from_map_Rd += dot(map_RC, value_Cd)
        value_d += tl.sum(as_sum(value_Cd), 0)
    alpha, beta = tl.load(affine_3H + head), tl.load(affine_3H + HEADS + head)
    gamma = tl.load(affine_3H + 2 * HEADS + head)
    out_Rd = alpha * from_reduced_Rd + beta * from_map_Rd + gamma * value_d[None, :]
    offset_Rd = (plane * TOKENS + row_R[:, None]) * WIDTH + feature_d[None, :]
    valid_Rd = (row_R[:, None] < TOKENS) & (feature_d[None, :] < WIDTH)
    tl.store(out_BHNd + offset_Rd, out_Rd.to(out_BHNd.dtype.element_ty), mask=valid_Rd)


def output(
    reduced_BHNN: Tensor, map_BHNN: Tensor, alpha_H: Tensor, beta_H: Tensor, gamma_H: Tensor, value_BHNd: Tensor
) -> Tensor:
    """Refined maps α·h3 + β·A + γ times values, [B, H, N, d] in the values' dtype; no refined map is made.

    Reads 4 bytes an entry of the map (in half precision).

    Args:
        reduced_BHNN, map_BHNN: h3 and the maps.
        alpha_H, beta_H, gamma_H: norms 3 and 4, folded.
        value_BHNd: values in the maps' dtype, heads lying anywhere.
    """
    reduced_BHNN, map_BHNN, value_BHNd = to_padded(reduced_BHNN), to_padded(map_BHNN), dense_rows(value_BHNd)
    batch, heads, tokens, width = value_BHNd.shape
    out_BHNd = value_BHNd.new_empty(batch, heads, tokens, width)
    affine_3H = torch.stack((alpha_H, beta_H, gamma_H)).to(statistics_dtype(map_BHNN.dtype))
    launch(
        _output, (batch * heads, triton.cdiv(tokens, ROWS)), reduced_BHNN, map_BHNN, affine_3H, value_BHNd, out_BHNd,
        *value_BHNd.stride()[:3],
        TOKENS=tokens, STRIDE=row_stride(tokens), HEADS=heads, WIDTH=width, PADDED=padded_size(width), ROWS=ROWS,
        COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out_BHNd
