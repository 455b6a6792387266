"""From maps to h3 in one kernel, with no expanded map written: where all of norm 2 is known beforehand.

    A ─ E₁, clip ─ kernel, norm 2, clip ─ P ─> h3, its moments with A      recomputing h3 in the way back
                                           └─ + gain·A + shift ─> T        inference

A program holds a few rows of A over a strip of keys, all heads, and the same rows of h3, while one group of expanded
maps after the other goes by. Maps of a group are clipped to [0, 1], see bottleneck_forward.py.

Axes: B batch, H heads, E expanded maps, N tokens, M expanded maps worked on together, L columns of a tile, Q its edges
(see spans.py), P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.fused.bottleneck_forward import (
    GROUP,
    groups_of,
    joint_moments,
    mix_computed,
    nan_unless_finite,
    nine_taps,
    sixth_of_u1,
    store_joint,
)
from refiner_ds.attention.fused.launching import launch
from refiner_ds.attention.fused.layout import empty_stack, laid_out, row_stride
from refiner_ds.attention.fused.spans import SPANS, edge_places, neighbours, span_places
from refiner_ds.attention.fused.tools import at_least_16, mix_stored, nine

__all__ = ["expand_local_project", "narrow_maps"]

KEYS = 4  # of a span
# Rows of a program, as many as registers hold: of maps in half precision, with sums beside, and in single precision or
# of more heads than one product takes.
HALF_ROWS, MEASURED_ROWS, SINGLE_ROWS = 5, 4, 2


@triton.jit
def _narrow(
    map_BHNN, folded_EH, shift_E, taps_E9, level_E, project_HE, affine_2H, narrow_BHNN, parts_P6H, spans,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    MEASURE: tl.constexpr,
):  # fmt: skip
    tile, segment = tl.program_id(0), tl.program_id(1)
    head_H, place_M = tl.arange(0, PADDED), tl.arange(0, GROUP)
    real_H, real_H1 = head_H < HEADS, head_H[:, None] < HEADS
    image_L, key_L, stored_L, here_L = span_places(tile, spans, TOKENS, STRIDE, KEYS)
    image_Q, key_Q, here_Q = edge_places(tile, spans, TOKENS, STRIDE, KEYS)
    AREA: tl.constexpr = TOKENS * STRIDE
    map_L, map_Q = map_BHNN + image_L * (HEADS * AREA) + key_L, map_BHNN + image_Q * (HEADS * AREA) + key_Q
    first = segment * ROWS
    maps, edges, inside_L, inside_Q = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(())
    narrow = tl.tuple(())
    for step in tl.static_range(ROWS + 2):
        row = first + step - 1
        row_L, row_Q = tl.where(stored_L, row, -1), tl.where(here_Q, row, -1)
        in_L, in_Q = (row_L >= 0) & (row_L < TOKENS), (row_Q >= 0) & (row_Q < TOKENS)
        place_HL = (map_L + row * STRIDE)[None, :] + (head_H * AREA)[:, None]
        place_HQ = (map_Q + row * STRIDE)[None, :] + (head_H * AREA)[:, None]
        maps += (tl.load(place_HL, mask=in_L[None, :] & real_H1, other=0.0),)
        edges += (tl.load(place_HQ, mask=in_Q[None, :] & real_H1, other=0.0),)
        inside_L += (in_L & here_L,)
        inside_Q += (in_Q,)
    empty_HL = tl.zeros([PADDED, 4 * KEYS], dtype=tl.float32)
    gain_H1 = tl.load(affine_2H + head_H, mask=real_H, other=0.0)[:, None]
    gain_HH = tl.where(head_H[:, None] == head_H[None, :], gain_H1, 0.0)
    shift_H1 = tl.load(affine_2H + HEADS + head_H, mask=real_H, other=0.0)[:, None]
    for step in tl.static_range(ROWS):
        narrow += (empty_HL if MEASURE else mix_stored(gain_HH, maps[step + 1], empty_HL + shift_H1),)
    for group in range(GROUPS):
        wide_M = group * SIZE + place_M
        narrow = _with_group(
            narrow, maps, edges, inside_L, inside_Q, wide_M, (place_M < SIZE) & (wide_M < EXPANDED), folded_EH,
            shift_E, taps_E9, level_E, project_HE, HEADS, EXPANDED, PADDED, GROUP, KEYS, ROWS,
        )  # fmt: skip
    narrow_L = narrow_BHNN + image_L * (HEADS * AREA) + key_L
    for step in tl.static_range(ROWS):
        place_HL = (narrow_L + (first + step) * STRIDE)[None, :] + (head_H * AREA)[:, None]
        rounded_HL = tl.where(here_L[None, :], narrow[step], 0.0).to(narrow_BHNN.dtype.element_ty)
        stored_HL = (stored_L & (tl.where(stored_L, first + step, TOKENS) < TOKENS))[None, :] & real_H1
        tl.store(place_HL, rounded_HL, mask=stored_HL)
    if MEASURE:
        part_H = parts_P6H + (tile * tl.num_programs(1) + segment) * (6 * HEADS) + head_H
        _measure(narrow, maps, inside_L, part_H, real_H, HEADS, PADDED, ROWS)


@triton.jit
def _with_group(
    narrow, maps, edges, inside_L, inside_Q, wide_M, real_M, folded_EH, shift_E, taps_E9, level_E, project_HE,
    HEADS: tl.constexpr, EXPANDED: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of h3 with what one group of expanded maps adds to them."""
    head_H = tl.arange(0, PADDED)
    real_1H, real_M1 = head_H[None, :] < HEADS, real_M[:, None]
    folded_MH = tl.load(folded_EH + wide_M[:, None] * HEADS + head_H[None, :], mask=real_M1 & real_1H, other=0.0)
    project_HM = tl.load(
        project_HE + head_H[:, None] * EXPANDED + wide_M[None, :],
        mask=real_M[None, :] & (head_H[:, None] < HEADS), other=0.0,
    )  # fmt: skip
    shift_M1 = tl.load(shift_E + wide_M, mask=real_M, other=0.0)[:, None]
    level_M1 = tl.load(level_E + wide_M, mask=real_M, other=0.0)[:, None]
    taps = nine(taps_E9, wide_M, real_M)
    before_ML = tl.zeros([GROUP, 4 * KEYS], dtype=tl.float32)
    now_ML = before_ML
    more = tl.tuple(())
    for step in tl.static_range(ROWS + 2):
        u1_ML = sixth_of_u1(folded_MH, maps[step], shift_M1, inside_L[step])
        edge_MQ = sixth_of_u1(folded_MH, edges[step], shift_M1, inside_Q[step])
        left_ML, right_ML = neighbours(u1_ML, edge_MQ, GROUP, KEYS)
        if step >= 2:
            h2_ML = before_ML + taps[6] * left_ML + taps[7] * u1_ML + taps[8] * right_ML
            u2_ML = tl.clamp(h2_ML, 0.0, 1.0)
            more += (mix_computed(project_HM, u2_ML, narrow[step - 2], maps[0].dtype),)
        before_ML = now_ML + taps[3] * left_ML + taps[4] * u1_ML + taps[5] * right_ML
        now_ML = level_M1 + taps[0] * left_ML + taps[1] * u1_ML + taps[2] * right_ML
    return more


@triton.jit
def _measure(
    narrow, maps, inside_L, part_H, real_H, HEADS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Sums of h3 and A over the program's rows; a product with the unit matrix brings A to where h3 is."""
    head_H = tl.arange(0, PADDED)
    unit_HH = tl.where(head_H[:, None] == head_H[None, :], 1.0, 0.0)
    empty_HL = tl.zeros([PADDED, maps[0].shape[1]], dtype=tl.float32)
    first_L = inside_L[1].to(tl.float32)
    seen = tl.sum(first_L, 0)
    pilot3_H1 = (tl.sum(narrow[0] * first_L[None, :], 1) / seen)[:, None]
    pilot_H1 = (tl.sum(mix_stored(unit_HH, maps[1], empty_HL), 1) / seen)[:, None]
    sum3_HL, sum_HL, square3_HL, cross_HL, square_HL = empty_HL, empty_HL, empty_HL, empty_HL, empty_HL
    count = 0.0 * seen
    for step in tl.static_range(ROWS):
        here_L = inside_L[step + 1].to(tl.float32)
        count += tl.sum(here_L, 0)
        apart3_HL = (narrow[step] - pilot3_H1) * here_L[None, :]
        apart_HL = (mix_stored(unit_HH, maps[step + 1], empty_HL) - pilot_H1) * here_L[None, :]
        sum3_HL += apart3_HL
        sum_HL += apart_HL
        square3_HL += apart3_HL * apart3_HL
        cross_HL += apart3_HL * apart_HL
        square_HL += apart_HL * apart_HL
    store_joint(
        part_H, real_H, HEADS, count, pilot3_H1, pilot_H1, tl.sum(sum3_HL, 1), tl.sum(sum_HL, 1),
        tl.sum(square3_HL, 1), tl.sum(cross_HL, 1), tl.sum(square_HL, 1),
    )  # fmt: skip


def expand_local_project(
    map_BHNN: Tensor,
    folded_EH: Tensor,
    shift1_E: Tensor,
    kernel_E1kk: Tensor,
    gain2_E: Tensor,
    shift2_E: Tensor,
    project_HE: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``project`` of what ``expand_local`` makes, without rounding or writing it (see bottleneck_forward.py).

    Reads 2 bytes an element of the map (in half precision), and again the rows that its programs share, from cache;
    writes 2.

    Returns:
        h3, [B, H, N, N] in the maps' dtype; its mean before rounding, [H], and the covariance of h3 and A within each
        head, [2, 2, H], float64.
    """
    taps_E9 = nine_taps(kernel_E1kk) * gain2_E.float()[:, None]
    unused_2H = gain2_E.new_zeros(2, map_BHNN.shape[1], dtype=torch.float32)
    narrow_BHNN, parts_P6H = narrow_maps(map_BHNN, folded_EH, shift1_E, taps_E9, shift2_E, project_HE, unused_2H, True)
    return narrow_BHNN, *joint_moments(parts_P6H)


def narrow_maps(
    map_BHNN: Tensor,
    folded_EH: Tensor,
    shift1_E: Tensor,
    taps_E9: Tensor,
    shift2_E: Tensor,
    project_HE: Tensor,
    affine_2H: Tensor,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """h3 and its moments, or T = h3 + gain·A + shift.

    Args:
        map_BHNN: maps.
        folded_EH, shift1_E: what the maps are multiplied with, and what is added.
        taps_E9: kernels with norm 2's gain in them; shift2_E: its shift.
        project_HE: the projection.
        affine_2H: gain and shift of the maps themselves, where they are added.
        measure: make h3 and measure it, or make T.
    Returns:
        [B, H, N, N] in the maps' dtype, and what ``joint_moments`` takes (if measured).
    """
    map_BHNN = laid_out(map_BHNN)
    batch, heads, tokens, _ = map_BHNN.shape
    wide, stride = folded_EH.shape[0], row_stride(tokens)
    groups, size = groups_of(wide)
    spans = batch * stride // KEYS
    rows = MEASURED_ROWS if measure else HALF_ROWS
    if map_BHNN.dtype == torch.float32 or heads > GROUP:
        rows = SINGLE_ROWS
    tiles, segments = triton.cdiv(spans, SPANS), triton.cdiv(tokens, rows)
    narrow_BHNN = empty_stack(map_BHNN)
    parts_P6H = map_BHNN.new_empty((tiles * segments if measure else 0, 6, heads), dtype=torch.float32)
    finite_E = nan_unless_finite(folded_EH.sum(1), shift1_E, taps_E9.sum(1), shift2_E)
    launch(
        _narrow, (tiles, segments), map_BHNN, folded_EH.float().contiguous() / 6, shift1_E.float() / 6,
        taps_E9.float().contiguous(), shift2_E.float() / 6, 6 * project_HE.float().contiguous() + finite_E,
        affine_2H.float().contiguous(), narrow_BHNN, parts_P6H, spans,
        TOKENS=tokens, STRIDE=stride, HEADS=heads, EXPANDED=wide, GROUPS=groups, SIZE=size,
        PADDED=at_least_16(heads), GROUP=GROUP, KEYS=KEYS, ROWS=rows, MEASURE=measure, num_warps=1, num_stages=1,
    )  # fmt: skip
    return narrow_BHNN, parts_P6H
