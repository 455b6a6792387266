"""Backward pass 3 of the released refiner by a kernel: through the local kernels, norm 1 and the expansion.

    m2, h2 ─> ∂h2 ─ flipped kernel ─> ∂u1 ─> m1 = 1[0 < u1 < 6]·∂u1 ─> share of ∂A, m1·(A − μ)ᵀ
    A ─> u1 of this row, the row before and the row after, each with ∂h2 and its neighbours ─> ∂kernel

A program of one warp walks down the rows of a few fragments of keys (see kernels/fragments.py), for one group of
expanded maps after the other. Both ∂kernel and ∂u1 pair a position with ∂h2 around it, so that u1 is needed nowhere
else. The share of ∂A is a sum over all groups: a program accumulates it in fp32, a few rows at a time, in scratch
memory of its own that stays in cache.

Axes: B batch, H heads, E expanded maps, N tokens, M expanded maps of a group, L columns of a tile, Q its halo, S
fragments, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.bottleneck.triton_backward import product_precision, to_columns
from refiner_ds.attention.bottleneck.triton_forward import GROUP, pad_to_nine_taps
from refiner_ds.attention.kernels.configurations import sizes_of
from refiner_ds.attention.kernels.dot import as_sum, dot_split_weight, load_taps, padded_size, relu6, zero_sums
from refiner_ds.attention.kernels.fragments import FRAGMENTS, fragment_offsets, halo_offsets, neighbours
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.masks import real_tokens
from refiner_ds.attention.kernels.padded import empty_padded, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["bwd_expand_local"]

# Of a fragment: 24 columns are computed for 16 of output. With 8 it would be 40 for 32, but 80 to 216 bytes spill.
KEYS = 4
ROWS = 16  # accumulated at a time: 18 are read, and a program's scratch memory is 16 kB
PROGRAMS = 4096  # fill a card a few times over; with more, their scratch memory would be too large

_FRAGMENTS = tl.constexpr(FRAGMENTS)


@triton.jit
def _local_gradient(m2_L, local_L, plane_M1, mask_M, stored_L, valid_L, gain_MM, slope_MM, level_M1):
    """∂h2 at some positions, zero outside the map. Products with diagonal matrices give it the layout of products."""
    stored_ML = stored_L[None, :] & mask_M[:, None]
    m2_ML = tl.load(m2_L[None, :] + plane_M1[:, None], mask=stored_ML, other=0.0)
    local_ML = tl.load(local_L[None, :] + plane_M1[:, None], mask=stored_ML, other=0.0)
    if m2_ML.dtype == tl.float16:
        m2_ML, local_ML = m2_ML.to(tl.float32), local_ML.to(tl.float32)  # its smallest numbers are too large for slopes
    sums_ML = zero_sums([plane_M1.shape[0], valid_L.shape[0]], m2_ML.dtype)
    sums_ML = dot_split_weight(gain_MM, m2_ML, sums_ML)
    return dot_split_weight(slope_MM, local_ML, sums_ML) + level_M1 * valid_L.to(tl.float32)[None, :]


@triton.jit
def _sum_fragments(sums_ML, MAPS: tl.constexpr, KEYS: tl.constexpr):
    """Sums over each thread's fragment, [M, S]."""
    return tl.sum(tl.sum(tl.reshape(sums_ML, [MAPS, KEYS // 2, _FRAGMENTS, 2]), 3), 1)


@triton.jit
def _accumulate_taps(
    sums, u1_before_ML, u1_now_ML, u1_after_ML, right_ML, dh2_ML, left_ML, MAPS: tl.constexpr, KEYS: tl.constexpr
):
    """∂kernel, tap by tap: to the sums, u1 of three rows times ∂h2 of the middle one and its neighbours."""
    return (
        sums[0] + _sum_fragments(u1_before_ML * right_ML, MAPS, KEYS),
        sums[1] + _sum_fragments(u1_before_ML * dh2_ML, MAPS, KEYS),
        sums[2] + _sum_fragments(u1_before_ML * left_ML, MAPS, KEYS),
        sums[3] + _sum_fragments(u1_now_ML * right_ML, MAPS, KEYS),
        sums[4] + _sum_fragments(u1_now_ML * dh2_ML, MAPS, KEYS),
        sums[5] + _sum_fragments(u1_now_ML * left_ML, MAPS, KEYS),
        sums[6] + _sum_fragments(u1_after_ML * right_ML, MAPS, KEYS),
        sums[7] + _sum_fragments(u1_after_ML * dh2_ML, MAPS, KEYS),
        sums[8] + _sum_fragments(u1_after_ML * left_ML, MAPS, KEYS),
    )


@triton.jit
def _weights(
    folded_EH, affine_4E, taps_E9, map_M, head_H, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUP: tl.constexpr
):
    """Of a group: folded expansion and shift, gain and slope as diagonal matrices, level, and nine taps."""
    mask_M, offset_M = map_M < EXPANDED, tl.arange(0, GROUP)
    diagonal_MM = (offset_M[:, None] == offset_M[None, :]).to(tl.float32)
    shift_M1 = tl.load(affine_4E + map_M, mask=mask_M, other=0.0)[:, None]
    gain_MM = tl.load(affine_4E + EXPANDED + map_M, mask=mask_M, other=0.0)[:, None] * diagonal_MM
    slope_MM = tl.load(affine_4E + 2 * EXPANDED + map_M, mask=mask_M, other=0.0)[:, None] * diagonal_MM
    level_M1 = tl.load(affine_4E + 3 * EXPANDED + map_M, mask=mask_M, other=0.0)[:, None]
    mask_MH = mask_M[:, None] & (head_H < HEADS)[None, :]
    folded_MH = tl.load(folded_EH + map_M[:, None] * HEADS + head_H[None, :], mask=mask_MH, other=0.0)
    return folded_MH, shift_M1, gain_MM, slope_MM, level_M1, load_taps(taps_E9, map_M, mask_M)


@triton.jit
def _store_share(
    scratch_HL, share_HL, top_L, stored_L, mask_H1, TOKENS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Store the share of some rows from scratch memory, which is then free for the next rows."""
    for row in range(ROWS):
        stored_HL = (stored_L & (top_L + row < TOKENS))[None, :] & mask_H1
        share = tl.load(scratch_HL + row * (scratch_HL.shape[0] * scratch_HL.shape[1]))
        offset_HL = share_HL + (top_L[None, :] + row) * STRIDE
        tl.store(offset_HL, share.to(share_HL.dtype.element_ty), mask=stored_HL)
    tl.debug_barrier()


@triton.jit
def _add(address, more, again):
    """Add to what this program stored there before, if it did; no other program writes there."""
    tl.store(address, tl.load(address, mask=again, other=0.0) + more)


@triton.jit
def _add_sums(sums_10E, cross_EH, sums, sum_MS, cross_MH, map_M, step, WIDE: tl.constexpr):
    """Add some rows' share of ∂kernel and of the sums of m1 to those of the program's earlier rows."""
    again_M = step + 0 * map_M > 0  # the interpreter makes no mask of one number
    for tap in tl.static_range(9):
        _add(sums_10E + tap * WIDE + map_M, tl.sum(sums[tap], 1), again_M)
    _add(sums_10E + 9 * WIDE + map_M, tl.sum(sum_MS, 1), again_M)
    PADDED: tl.constexpr = cross_MH.shape[1]
    entry_MH = map_M[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    _add(cross_EH + entry_MH, cross_MH, step + 0 * entry_MH > 0)


@triton.jit
def _activated(
    map_HL, row, limit, stored_L, valid_L, image_L, mask_BN, mask_H1, folded_MH, shift_M1,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """u1 of one row above ``limit``, zero outside: read once, it serves three rows of ∂kernel and its own gate."""
    row_L = row + tl.zeros_like(valid_L).to(tl.int32)  # the interpreter makes no mask of one number
    map_HL = tl.load(map_HL + row * STRIDE, mask=(stored_L & (row_L < limit))[None, :] & mask_H1, other=0.0)
    empty_ML = zero_sums([folded_MH.shape[0], valid_L.shape[0]], map_HL.dtype)
    u1_ML = relu6(dot_split_weight(folded_MH, map_HL, empty_ML) + shift_M1)
    in_L = valid_L & (row_L < limit)
    if MASKED:
        in_L = real_tokens(mask_BN, image_L, row, in_L, TOKENS)
    return tl.where(in_L[None, :], u1_ML, 0.0)


@triton.jit
def _local_gradient_row(
    m2_BENN, local_BENN, row, at_L, at_Q, stored_L, valid_L, valid_Q, image_L, image_Q, mask_BN, plane_M, mask_M,
    gain_MM, slope_MM, level_M1,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """∂h2 of one row, and its neighbours along the keys: all nine taps of ∂u1 and ∂kernel come from these."""
    row_L, row_Q = row + 0 * at_L, row + 0 * at_Q
    in_L, in_Q = (row_L >= 0) & (row_L < TOKENS), valid_Q & (row_Q >= 0) & (row_Q < TOKENS)
    if MASKED:
        in_L = real_tokens(mask_BN, image_L, row, stored_L & in_L, TOKENS)
        in_Q = real_tokens(mask_BN, image_Q, row, in_Q, TOKENS)
    dh2_ML = _local_gradient(
        m2_BENN + at_L + row * STRIDE, local_BENN + at_L + row * STRIDE, plane_M, mask_M, stored_L & in_L,
        valid_L & in_L, gain_MM, slope_MM, level_M1,
    )  # fmt: skip
    dh2_MQ = _local_gradient(
        m2_BENN + at_Q + row * STRIDE, local_BENN + at_Q + row * STRIDE, plane_M, mask_M, in_Q, in_Q,
        gain_MM, slope_MM, level_M1,
    )  # fmt: skip
    left_ML, right_ML = neighbours(dh2_ML, dh2_MQ, GROUP, KEYS)
    return left_ML, dh2_ML, right_ML


@triton.jit
def _through_expansion(
    map_HL, scratch_HL, m1_ML, cross_MH, stored_HL, mean_H1, folded_MH, again_HL, PRECISION: tl.constexpr
):  # fmt: skip
    """m1·(A − μ)ᵀ of one row, added to ``cross``; the row's share of ∂A, added in scratch memory to other groups'."""
    map_HL = tl.load(map_HL, mask=stored_HL, other=0.0)
    centred_HL = tl.where(stored_HL, as_sum(map_HL) - mean_H1, 0.0)
    share_HL = tl.load(scratch_HL, mask=again_HL, other=0.0)
    share_HL = tl.dot(tl.trans(folded_MH), m1_ML, share_HL, input_precision=PRECISION, out_dtype=m1_ML.dtype)
    tl.store(scratch_HL, share_HL)
    return tl.dot(m1_ML, tl.trans(centred_HL), cross_MH, input_precision=PRECISION, out_dtype=m1_ML.dtype)


@triton.jit
def _bwd_expand_local(
    map_BHNN, local_BENN, m2_BENN, folded_EH, affine_4E, taps_E9, mean_H, share_BHNN, scratch_PRHL, sums_P10E,
    cross_PEH, fragments, steps, mask_BN,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    tile, segment = tl.program_id(0), tl.program_id(1)
    AREA: tl.constexpr = TOKENS * STRIDE
    COLUMNS: tl.constexpr = _FRAGMENTS * KEYS
    head_H, offset_M = tl.arange(0, PADDED), tl.arange(0, GROUP)
    mask_H1 = (head_H < HEADS)[:, None]
    image_L, key_L, stored_L, valid_L = fragment_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    image_Q, key_Q, valid_Q = halo_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    if MASKED:
        valid_L = real_tokens(mask_BN, image_L, key_L, valid_L, TOKENS)
        valid_Q = real_tokens(mask_BN, image_Q, key_Q, valid_Q, TOKENS)
    at_HL = (image_L * (HEADS * AREA) + key_L)[None, :] + (head_H * AREA)[:, None]
    at_L, at_Q = image_L * (EXPANDED * AREA) + key_L, image_Q * (EXPANDED * AREA) + key_Q
    mean_H1 = tl.load(mean_H + head_H, mask=head_H < HEADS, other=0.0)[:, None]
    program = (tile * tl.num_programs(1) + segment).to(tl.int64)
    scratch_HL = scratch_PRHL + program * (ROWS * PADDED * COLUMNS)
    scratch_HL += head_H[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for step in range(steps):
        top = (segment * steps + step) * ROWS
        for group in range(GROUPS):
            map_M = group * GROUP + offset_M
            folded_MH, shift_M1, gain_MM, slope_MM, level_M1, taps = _weights(
                folded_EH, affine_4E, taps_E9, map_M, head_H, HEADS, EXPANDED, GROUP
            )
            sums = tl.tuple(())
            for _ in tl.static_range(9):
                sums += (zero_sums([GROUP, _FRAGMENTS], map_BHNN.dtype.element_ty),)
            sum_MS = zero_sums([GROUP, _FRAGMENTS], map_BHNN.dtype.element_ty)
            cross_MH = zero_sums([GROUP, PADDED], map_BHNN.dtype.element_ty)
            # Partial sums of ∂u1 for the row before the one just read, and for that row.
            before_ML = zero_sums([GROUP, COLUMNS], map_BHNN.dtype.element_ty)
            now_ML = zero_sums([GROUP, COLUMNS], map_BHNN.dtype.element_ty)
            # Triton carries a variable through a loop only if it ends up as another value: of two that begin as one
            # zero and take each other's place, the compiled kernel would see zero for ever.
            u1_before_ML = zero_sums([GROUP, COLUMNS], map_BHNN.dtype.element_ty)
            u1_now_ML = zero_sums([GROUP, COLUMNS], map_BHNN.dtype.element_ty)
            for line in range(ROWS + 2):
                row, plane = top + line - 1, group * (GROUP * AREA)
                left_ML, dh2_ML, right_ML = _local_gradient_row(
                    m2_BENN, local_BENN, row, at_L + plane, at_Q + plane, stored_L, valid_L, valid_Q, image_L, image_Q,
                    mask_BN, offset_M * AREA, map_M < EXPANDED, gain_MM, slope_MM, level_M1,
                    TOKENS, STRIDE, GROUP, KEYS, MASKED,
                )  # fmt: skip
                u1_after_ML = _activated(
                    map_BHNN + at_HL, row + 1, tl.minimum(TOKENS, top + ROWS), stored_L, valid_L, image_L, mask_BN,
                    mask_H1, folded_MH, shift_M1, TOKENS, STRIDE, MASKED,
                )  # fmt: skip
                done_ML = before_ML + taps[0] * right_ML + taps[1] * dh2_ML + taps[2] * left_ML
                before_ML = now_ML + taps[3] * right_ML + taps[4] * dh2_ML + taps[5] * left_ML
                now_ML = taps[6] * right_ML + taps[7] * dh2_ML + taps[8] * left_ML
                sums = _accumulate_taps(
                    sums, u1_before_ML, u1_now_ML, u1_after_ML, right_ML, dh2_ML, left_ML, GROUP, KEYS
                )
                if line >= 2:
                    m1_ML = tl.where((u1_before_ML > 0.0) & (u1_before_ML < 6.0), done_ML, 0.0)
                    sum_MS += _sum_fragments(m1_ML, GROUP, KEYS)
                    stored_HL = (stored_L & (row - 1 + 0 * key_L < TOKENS))[None, :] & mask_H1
                    cross_MH = _through_expansion(
                        map_BHNN + at_HL + (row - 1) * STRIDE, scratch_HL + (line - 2) * (PADDED * COLUMNS), m1_ML,
                        cross_MH, stored_HL, mean_H1, folded_MH, group + 0 * head_H[:, None] > 0, PRECISION,
                    )  # fmt: skip
                u1_before_ML, u1_now_ML = u1_now_ML, u1_after_ML
            sums_10E = sums_P10E + program * (10 * GROUPS * GROUP)
            cross_EH = cross_PEH + program * (GROUPS * GROUP * PADDED)
            _add_sums(sums_10E, cross_EH, sums, sum_MS, cross_MH, map_M, step, GROUPS * GROUP)
            tl.debug_barrier()  # what this group stored is read by the next one
        _store_share(scratch_HL, share_BHNN + at_HL, top + 0 * key_L, stored_L, mask_H1, TOKENS, STRIDE, ROWS)


def bwd_expand_local(
    map_BHNN: Tensor,
    local_BENN: Tensor,
    m2_BENN: Tensor,
    folded_EH: Tensor,
    shift1_E: Tensor,
    kernel_E1kk: Tensor,
    gain2_E: Tensor,
    slope_E: Tensor,
    level_E: Tensor,
    mean_H: Tensor,
    mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass 3, with u1 = relu6(folded · A + shift) and ∂h2 = gain·m2 + slope·h2 + level.

    Reads A, h2 and m2 and writes the share: 2 + 2E/H entries per entry of A.

    Args:
        map_BHNN, local_BENN, m2_BENN: A, h2 and m2, one dtype.
        folded_EH, shift1_E: the expansion with norm 1 in it.
        kernel_E1kk: the local kernels, of size 1 or 3.
        gain2_E, slope_E, level_E: norm 2, backward.
        mean_H: the mean of A.
        mask_BN: which tokens are real, bool; h2 and m2 of the others are zero.
    Returns:
        The share of ∂A that comes through the expanded maps, [B, H, N, N] in the maps' dtype; ∂kernel in its shape; the
        sums of m1, [E], and of m1·(A − mean)ᵀ, [E, H]; float64.
    """
    map_BHNN, local_BENN, m2_BENN = to_padded(map_BHNN), to_padded(local_BENN), to_padded(m2_BENN)
    batch, heads, tokens, _ = map_BHNN.shape
    stride = row_stride(tokens)
    expanded, side, padded = local_BENN.shape[1], kernel_E1kk.shape[-1], padded_size(heads)
    keys, rows = sizes_of("bwd_expand_local", architecture(map_BHNN.device), KEYS=KEYS, ROWS=ROWS).values()
    fragments, groups = batch * stride // keys, triton.cdiv(expanded, GROUP)
    tiles, blocks = triton.cdiv(fragments, FRAGMENTS), triton.cdiv(tokens, rows)
    steps = triton.cdiv(blocks, max(1, PROGRAMS // tiles))
    segments = triton.cdiv(blocks, steps)
    share_BHNN, precision = empty_padded(map_BHNN), statistics_dtype(map_BHNN.dtype)
    programs, wide = tiles * segments, groups * GROUP
    scratch_PRHL = map_BHNN.new_empty(programs, rows, padded, FRAGMENTS * keys, dtype=precision)
    sums_P10E = map_BHNN.new_empty(programs, 10, wide, dtype=precision)
    cross_PEH = map_BHNN.new_empty(programs, wide, padded, dtype=precision)
    launch(
        _bwd_expand_local, (tiles, segments), map_BHNN, local_BENN, m2_BENN, folded_EH.to(precision).contiguous(),
        to_columns((shift1_E, gain2_E, slope_E, level_E), precision), pad_to_nine_taps(kernel_E1kk, precision),
        mean_H.to(precision), share_BHNN, scratch_PRHL, sums_P10E, cross_PEH, fragments, steps,
        sums_P10E if mask_BN is None else mask_bytes(mask_BN),
        TOKENS=tokens, STRIDE=stride, HEADS=heads, EXPANDED=expanded, GROUPS=groups, PADDED=padded, GROUP=GROUP,
        KEYS=keys, ROWS=rows, PRECISION=product_precision(map_BHNN), MASKED=mask_BN is not None,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    sums_10E = sums_P10E.sum(0, dtype=torch.float64)[:, :expanded]
    cross_EH = cross_PEH.sum(0, dtype=torch.float64)[:expanded, :heads]
    margin = (3 - side) // 2
    d_kernel_E1kk = sums_10E[:9].T.reshape(expanded, 1, 3, 3)[..., margin : 3 - margin, margin : 3 - margin]
    return share_BHNN, d_kernel_E1kk, sums_10E[9], cross_EH
