"""The released refiner for inference, norms folded: one kernel that writes nothing expanded, and a matrix product.

    A ─ expand, bias, clip ─ local, bias, clip ─ reduce, + gain·A + shift ──> T ─ · V ─> out

A program holds a few rows of A over some fragments of keys, all heads, and the same rows of T, and loops over groups of
expanded maps. Expanded maps are clipped to [0, 1], see triton_forward.py.

Axes: B batch, H heads, E expanded maps, N tokens, d head width, M expanded maps of a group, L columns of a tile, Q its
halo (see kernels/fragments.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.bottleneck.triton_forward import (
    GROUP,
    dot_split_both,
    groups_of,
    nan_unless_finite,
    pad_to_nine_taps,
    relu6_unit,
)
from refiner_ds.attention.kernels.configurations import sizes_of
from refiner_ds.attention.kernels.dot import dot_split_weight, load_taps, padded_size, zero_sums
from refiner_ds.attention.kernels.fragments import FRAGMENTS, fragment_offsets, halo_offsets, neighbours
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.masks import real_tokens
from refiner_ds.attention.kernels.padded import empty_padded, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.weights import FoldedWeights

__all__ = ["refine_folded"]

KEYS = 4  # of a fragment
# Rows of a program, as many as registers hold: of maps in half precision; in single precision, or of more heads than
# one product takes.
HALF_ROWS, SINGLE_ROWS = 5, 2


@triton.jit
def _refine_folded(
    map_BHNN, folded_EH, shift_E, taps_E9, level_E, reduce_HE, affine_2H, mask_BN, refined_BHNN, fragments,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, EXPANDED: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    tile, segment = tl.program_id(0), tl.program_id(1)
    head_H, offset_M = tl.arange(0, PADDED), tl.arange(0, GROUP)
    mask_H, mask_H1 = head_H < HEADS, head_H[:, None] < HEADS
    image_L, key_L, stored_L, valid_L = fragment_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    image_Q, key_Q, valid_Q = halo_offsets(tile, fragments, TOKENS, STRIDE, KEYS)
    AREA: tl.constexpr = TOKENS * STRIDE
    map_L, map_Q = map_BHNN + image_L * (HEADS * AREA) + key_L, map_BHNN + image_Q * (HEADS * AREA) + key_Q
    if MASKED:
        valid_L &= real_tokens(mask_BN, image_L, key_L, valid_L, TOKENS)
        real_Q = real_tokens(mask_BN, image_Q, key_Q, valid_Q, TOKENS)
    first = segment * ROWS
    maps, halos, inside_L, inside_Q = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(())
    refined = tl.tuple(())
    for step in tl.static_range(ROWS + 2):
        row = first + step - 1
        row_L, row_Q = tl.where(stored_L, row, -1), tl.where(valid_Q, row, -1)
        in_L, in_Q = (row_L >= 0) & (row_L < TOKENS), (row_Q >= 0) & (row_Q < TOKENS)
        offset_HL = (map_L + row * STRIDE)[None, :] + (head_H * AREA)[:, None]
        offset_HQ = (map_Q + row * STRIDE)[None, :] + (head_H * AREA)[:, None]
        maps += (tl.load(offset_HL, mask=in_L[None, :] & mask_H1, other=0.0),)
        halos += (tl.load(offset_HQ, mask=in_Q[None, :] & mask_H1, other=0.0),)
        if MASKED:
            inside_L += (valid_L & real_tokens(mask_BN, image_L, row, in_L, TOKENS),)
            inside_Q += (real_Q & real_tokens(mask_BN, image_Q, row, in_Q, TOKENS),)
        else:
            inside_L += (in_L & valid_L,)
            inside_Q += (in_Q,)
    empty_HL = zero_sums([PADDED, 4 * KEYS], map_BHNN.dtype.element_ty)
    gain_H1 = tl.load(affine_2H + head_H, mask=mask_H, other=0.0)[:, None]
    gain_HH = tl.where(head_H[:, None] == head_H[None, :], gain_H1, 0.0)
    shift_H1 = tl.load(affine_2H + HEADS + head_H, mask=mask_H, other=0.0)[:, None]
    for step in tl.static_range(ROWS):
        refined += (dot_split_weight(gain_HH, maps[step + 1], empty_HL + shift_H1),)
    for group in range(GROUPS):
        map_M = group * SIZE + offset_M
        refined = _with_group(
            refined, maps, halos, inside_L, inside_Q, map_M, (offset_M < SIZE) & (map_M < EXPANDED), folded_EH,
            shift_E, taps_E9, level_E, reduce_HE, HEADS, EXPANDED, PADDED, GROUP, KEYS, ROWS,
        )  # fmt: skip
    refined_L = refined_BHNN + image_L * (HEADS * AREA) + key_L
    for step in tl.static_range(ROWS):
        offset_HL = (refined_L + (first + step) * STRIDE)[None, :] + (head_H * AREA)[:, None]
        rounded_HL = tl.where(valid_L[None, :], refined[step], 0.0).to(refined_BHNN.dtype.element_ty)
        stored_HL = (stored_L & (tl.where(stored_L, first + step, TOKENS) < TOKENS))[None, :] & mask_H1
        tl.store(offset_HL, rounded_HL, mask=stored_HL)


@triton.jit
def _with_group(
    refined, maps, halos, inside_L, inside_Q, map_M, mask_M, folded_EH, shift_E, taps_E9, level_E, reduce_HE,
    HEADS: tl.constexpr, EXPANDED: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of h3 with what one group of expanded maps adds to them."""
    head_H = tl.arange(0, PADDED)
    mask_1H, mask_M1 = head_H[None, :] < HEADS, mask_M[:, None]
    folded_MH = tl.load(folded_EH + map_M[:, None] * HEADS + head_H[None, :], mask=mask_M1 & mask_1H, other=0.0)
    reduce_HM = tl.load(
        reduce_HE + head_H[:, None] * EXPANDED + map_M[None, :],
        mask=mask_M[None, :] & (head_H[:, None] < HEADS), other=0.0,
    )  # fmt: skip
    shift_M1 = tl.load(shift_E + map_M, mask=mask_M, other=0.0)[:, None]
    level_M1 = tl.load(level_E + map_M, mask=mask_M, other=0.0)[:, None]
    taps = load_taps(taps_E9, map_M, mask_M)
    before_ML = zero_sums([GROUP, 4 * KEYS], maps[0].dtype)
    now_ML = before_ML
    more = tl.tuple(())
    for step in tl.static_range(ROWS + 2):
        u1_ML = relu6_unit(folded_MH, maps[step], shift_M1, inside_L[step])
        halo_MQ = relu6_unit(folded_MH, halos[step], shift_M1, inside_Q[step])
        left_ML, right_ML = neighbours(u1_ML, halo_MQ, GROUP, KEYS)
        if step >= 2:
            h2_ML = before_ML + taps[6] * left_ML + taps[7] * u1_ML + taps[8] * right_ML
            u2_ML = tl.clamp(h2_ML, 0.0, 1.0)
            more += (dot_split_both(reduce_HM, u2_ML, refined[step - 2], maps[0].dtype),)
        before_ML = now_ML + taps[3] * left_ML + taps[4] * u1_ML + taps[5] * right_ML
        now_ML = level_M1 + taps[0] * left_ML + taps[1] * u1_ML + taps[2] * right_ML
    return more


@torch.no_grad()
def refine_folded(
    map_BHNN: Tensor, value_BHNd: Tensor, weights: FoldedWeights, mask_BN: Tensor | None = None
) -> Tensor:
    """Refined maps times values, [B, H, N, d]; constraint "none" and kernels of size 1 or 3 only.

    Reads 2 bytes an entry of the map (in half precision), writes and reads 2 for T.

    Args:
        map_BHNN, value_BHNd: maps and values in one dtype, fp32 or half precision; in the interpreter float64 too.
        weights: with their norms folded.
        mask_BN: which tokens are real, bool; maps and values of the others are zero, and the output of their rows any
            number.
    """
    with torch.autocast(map_BHNN.device.type, enabled=False):
        return _refined_map(map_BHNN, weights, mask_BN) @ value_BHNd


def _refined_map(map_BHNN: Tensor, weights: FoldedWeights, mask_BN: Tensor | None) -> Tensor:
    """T, [B, H, N, N] in the map's dtype."""
    precision = statistics_dtype(map_BHNN.dtype)
    map_BHNN, taps_E9 = to_padded(map_BHNN), pad_to_nine_taps(weights.local.kernels[0], precision)
    batch, heads, tokens, _ = map_BHNN.shape
    expanded, stride = weights.expand_EH.shape[0], row_stride(tokens)
    groups, size = groups_of(expanded)
    keys, rows = sizes_of("refine_folded", architecture(map_BHNN.device), KEYS=KEYS, ROWS=HALF_ROWS).values()
    rows = min(rows, SINGLE_ROWS) if map_BHNN.dtype == precision or heads > GROUP else rows
    fragments = batch * stride // keys
    refined_BHNN = empty_padded(map_BHNN)
    finite_E = nan_unless_finite(weights.expand_EH.sum(1), weights.bias1_E, taps_E9.sum(1), weights.bias2_E)
    launch(
        _refine_folded, (triton.cdiv(fragments, FRAGMENTS), triton.cdiv(tokens, rows)),
        map_BHNN, weights.expand_EH.to(precision).contiguous() / 6, weights.bias1_E.to(precision) / 6, taps_E9,
        weights.bias2_E.to(precision) / 6, 6 * weights.reduce_HE.to(precision).contiguous() + finite_E,
        torch.stack((weights.gain_H, weights.shift_H)).to(precision),
        refined_BHNN if mask_BN is None else mask_bytes(mask_BN), refined_BHNN, fragments,
        TOKENS=tokens, STRIDE=stride, HEADS=heads, EXPANDED=expanded, GROUPS=groups, SIZE=size,
        PADDED=padded_size(heads), GROUP=GROUP, KEYS=keys, ROWS=rows,
        MASKED=mask_BN is not None, num_warps=1, num_stages=1,
    )  # fmt: skip
    return refined_BHNN
