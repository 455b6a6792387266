"""The backward passes of the released refiner by four kernels, from A and the activations h2 and h3.

    1  bwd_output           A, h3, V, ∂out ──> ∂T, ∂V, the sums that norms 3 and 4 need
    2  bwd_reduce           A, h3, ∂T, h2  ──> m2 (the gradient after norm 2), ∂reduce, the sums that norm 2 needs
    3  bwd_expand_local     A, h2, m2      ──> the expanded share of ∂A, ∂kernel, the sums that norm 1 needs
    4  bwd_map_statistics   A, h3, ∂T, share ──> ∂A

Between them the caller turns sums into coefficients: ∂h3, for one, is ∂T, h3 and A, each times a number a head. Sums
leave a program in fp32 and are added up in float64. Pass 3 is in triton_backward_local.py.

Axes: B batch, H heads, E expanded maps, N tokens, d head width, L positions of a program's step, G expanded maps of a
group, R query rows and C keys of a tile, P programs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.bottleneck.triton_forward import GROUP
from refiner_ds.attention.kernels.dot import as_sum, dense_rows, dot, dot_split_weight, padded_size, relu6, zero_sums
from refiner_ds.attention.kernels.launch import architecture, launch
from refiner_ds.attention.kernels.masks import real_entries
from refiner_ds.attention.kernels.padded import empty_padded, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["bwd_output", "bwd_reduce", "bwd_map_statistics"]

# A tile of pass 1: the fewest rows that warp-group products take; in fp32 half of that, or registers spill.
ROWS = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
KEYS = 64
GROUPS = 3  # of expanded maps in a program of pass 2, of 16 heads; with more, registers spill
POSITIONS = 128  # of a program of pass 4
# Of pass 2: each warp has a cut of its own, of as many positions as let all groups stay in registers.
WARPS, LANES = 4, 16
STEPS = 16  # of a program of pass 2: its sums are 2 % of the bytes that it reads


# -- pass 1 --------------------------------------------------------------------------------------------------------


@triton.jit
def _bwd_output(
    map_BHNN, reduced_BHNN, value_BHNd, grad_BHNd, refined_3H, dt_BHNN, d_value_BHNd, sums_P3,
    value_strides, grad_strides, heads, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    plane, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, head = plane // heads, plane % heads
    key_C, feature_d = part * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    AREA: tl.constexpr = TOKENS * STRIDE
    map_NN, reduced_NN, dt_NN = map_BHNN + plane * AREA, reduced_BHNN + plane * AREA, dt_BHNN + plane * AREA
    value_Nd = value_BHNd + image * value_strides[0] + head * value_strides[1]
    grad_Nd = grad_BHNd + image * grad_strides[0] + head * grad_strides[1]
    valid_Cd = (key_C[:, None] < TOKENS) & (feature_d[None, :] < width)
    value_Cd = tl.load(value_Nd + key_C[:, None] * value_strides[2] + feature_d[None, :], mask=valid_Cd, other=0.0)
    # T is affine in h3 and A: each is multiplied with ∂out, and every sum follows from the two products and V.
    reduced_Cd = zero_sums([KEYS, WIDTH], map_BHNN.dtype.element_ty)
    map_Cd = zero_sums([KEYS, WIDTH], map_BHNN.dtype.element_ty)
    grad_d = zero_sums([WIDTH], map_BHNN.dtype.element_ty)
    for step in range(STEPS):
        row_R = step * ROWS + tl.arange(0, ROWS)
        valid_Rd = (row_R[:, None] < TOKENS) & (feature_d[None, :] < width)
        grad_Rd = tl.load(grad_Nd + row_R[:, None] * grad_strides[2] + feature_d[None, :], mask=valid_Rd, other=0.0)
        offset_RC = row_R[:, None] * STRIDE + key_C[None, :]
        stored_RC = (row_R[:, None] < TOKENS) & (key_C[None, :] < STRIDE)
        map_RC = tl.load(map_NN + offset_RC, mask=stored_RC, other=0.0)
        reduced_RC = tl.load(reduced_NN + offset_RC, mask=stored_RC, other=0.0)
        dt_RC = dot(grad_Rd, tl.trans(value_Cd))  # zero after the last key and for padding, as values and ∂out are
        tl.store(dt_NN + offset_RC, dt_RC.to(dt_BHNN.dtype.element_ty), mask=stored_RC)
        reduced_Cd += dot(tl.trans(reduced_RC), grad_Rd)
        map_Cd += dot(tl.trans(map_RC), grad_Rd)
        grad_d += tl.sum(as_sum(grad_Rd), 0)
    alpha = tl.load(refined_3H + head)
    beta = tl.load(refined_3H + heads + head)
    gamma = tl.load(refined_3H + 2 * heads + head)
    d_value_Cd = alpha * reduced_Cd + beta * map_Cd + gamma * grad_d[None, :]
    offset_Cd = plane * TOKENS * width + key_C[:, None] * width + feature_d[None, :]
    tl.store(d_value_BHNd + offset_Cd, d_value_Cd.to(d_value_BHNd.dtype.element_ty), mask=valid_Cd)
    sums_3 = sums_P3 + (plane * tl.num_programs(1) + part) * 3
    value_Cd = as_sum(value_Cd)
    tl.store(sums_3, tl.sum(tl.sum(value_Cd * grad_d[None, :], 1), 0))
    tl.store(sums_3 + 1, tl.sum(tl.sum(value_Cd * reduced_Cd, 1), 0))
    tl.store(sums_3 + 2, tl.sum(tl.sum(value_Cd * map_Cd, 1), 0))


def bwd_output(
    map_BHNN: Tensor,
    reduced_BHNN: Tensor,
    value_BHNd: Tensor,
    grad_BHNd: Tensor,
    alpha_H: Tensor,
    beta_H: Tensor,
    gamma_H: Tensor,
    mean3_H: Tensor,
    mean_H: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pass 1, with T = α·h3 + β·A + γ.

    Reads A and h3 and writes ∂T: 3 entries per entry of A. ∂T is written because two later passes, pointwise over the
    heads, then read it instead of multiplying all heads' ∂out and V at each of their positions.

    Args:
        map_BHNN, reduced_BHNN: A and h3, one dtype.
        value_BHNd, grad_BHNd: values, and the gradient of the output; multiplied in the maps' dtype.
        alpha_H, beta_H, gamma_H: norms 3 and 4, folded.
        mean3_H, mean_H: means of h3 and A.
    Returns:
        ∂V in its dtype and ∂T in the maps', both [B, H, N, ·]; the sums of ∂T, ∂T·(h3 − mean) and ∂T·(A − mean),
        each [H], float64.
    """
    map_BHNN, reduced_BHNN = to_padded(map_BHNN), to_padded(reduced_BHNN)
    batch, heads, tokens, _ = map_BHNN.shape
    width = value_BHNd.shape[-1]
    value, grad = dense_rows(value_BHNd.to(map_BHNN.dtype)), dense_rows(grad_BHNd.to(map_BHNN.dtype))
    dt_BHNN = empty_padded(map_BHNN)
    d_value_BHNd = value_BHNd.new_empty(value_BHNd.shape)
    parts, rows, precision = triton.cdiv(tokens, KEYS), ROWS[map_BHNN.dtype], statistics_dtype(map_BHNN.dtype)
    sums_P3 = map_BHNN.new_empty(batch, heads, parts, 3, dtype=precision)
    launch(
        _bwd_output, (batch * heads, parts), map_BHNN, reduced_BHNN, value, grad,
        to_columns((alpha_H, beta_H, gamma_H), precision), dt_BHNN, d_value_BHNd, sums_P3,
        value.stride()[:3], grad.stride()[:3], heads, width,
        TOKENS=tokens, STRIDE=row_stride(tokens), WIDTH=padded_size(width), ROWS=rows, KEYS=KEYS,
        STEPS=triton.cdiv(tokens, rows), num_warps=4 if width <= 32 else 8,
    )  # fmt: skip
    t0_H, t1_H, t2_H = sums_P3.sum((0, 2), dtype=torch.float64).unbind(1)
    return d_value_BHNd, dt_BHNN, t0_H, t1_H - mean3_H * t0_H, t2_H - mean_H * t0_H


def to_columns(vectors: Iterable[Tensor], precision: torch.dtype) -> Tensor:
    """Vectors of one length stacked in the precision of sums, as kernels read them."""
    return torch.stack(tuple(vectors)).to(precision)


# -- pass 2 --------------------------------------------------------------------------------------------------------


@triton.jit
def _reduced_gradient(
    map_H1, reduced_H1, dt_H1, start, lane_L, cut_L, stored_HL, gain, on_reduced, on_map, level, mask_BN, image,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """∂h3 at a program's step, from ∂T, h3 and A: all groups of expanded maps multiply it, and it is never written."""
    # Cuts are added last: known when compiling, they cost loads nothing.
    map_HL = as_sum(tl.load(map_H1 + start + lane_L + cut_L, mask=stored_HL))
    reduced_HL = as_sum(tl.load(reduced_H1 + start + lane_L + cut_L, mask=stored_HL))
    dt_HL = as_sum(tl.load(dt_H1 + start + lane_L + cut_L, mask=stored_HL))
    valid_HL = stored_HL & ((start + cut_L + lane_L) % STRIDE < TOKENS)
    if MASKED:
        offset_L = start + cut_L + lane_L
        stored_L = (offset_L < TOKENS * STRIDE) & (offset_L % STRIDE < TOKENS)
        valid_HL &= real_entries(mask_BN, image, offset_L, stored_L, TOKENS, STRIDE)
    # Zero after rows' last keys and for padding, and so is all that follows from it.
    return tl.where(valid_HL, gain * dt_HL + on_reduced * reduced_HL + on_map * map_HL + level, 0.0)


@triton.jit
def _expanded_gradient(
    local_BEL, m2_BEL, stored_L, norm_2E, reduce_HE, map_G1, head_H, dh3_HL, heads, expanded,
    WARPS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u2, m2 and h2 of one group of expanded maps, [warps, G, L]; m2 is stored, as the next pass starts from it."""
    gain_G1 = tl.load(norm_2E + map_G1, mask=map_G1 < expanded, other=0.0)
    shift_G1 = tl.load(norm_2E + expanded + map_G1, mask=map_G1 < expanded, other=0.0)
    reduce_GH = tl.load(
        reduce_HE + head_H[None, None, :] * expanded + map_G1,
        mask=(head_H[None, None, :] < heads) & (map_G1 < expanded), other=0.0,
    )  # fmt: skip
    reduce_WGH = tl.broadcast_to(reduce_GH, [WARPS, GROUP, PADDED])
    stored_GL = (map_G1 < expanded) & stored_L
    local_GL = as_sum(tl.load(local_BEL, mask=stored_GL, other=0.0))
    before_GL = gain_G1 * local_GL + shift_G1
    du2_GL = tl.dot(reduce_WGH, dh3_HL, input_precision=PRECISION, out_dtype=dh3_HL.dtype)
    m2_GL = tl.where((before_GL > 0.0) & (before_GL < 6.0), du2_GL, 0.0)
    tl.store(m2_BEL, m2_GL.to(m2_BEL.dtype.element_ty), mask=stored_GL)
    return relu6(before_GL), m2_GL, local_GL


@triton.jit
def _bwd_reduce(
    map_BHNN, reduced_BHNN, dt_BHNN, local_BENN, to_reduced_4H, norm_2E, reduce_HE, m2_BENN, d_reduce_PEH, sums_P2E,
    heads, expanded, mask_BN,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WARPS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    image, part, start_G = tl.program_id(0), tl.program_id(1), tl.program_id(2) * GROUPS * GROUP
    AREA: tl.constexpr = TOKENS * STRIDE
    first, first_expanded = image.to(tl.int64) * heads * AREA, image.to(tl.int64) * expanded * AREA
    head_H, map_G = tl.arange(0, PADDED), tl.arange(0, GROUP)
    # All in three dimensions, [warps, maps, lanes]: each warp multiplies its own cut.
    head_H1, cut_L = head_H[None, :, None], tl.arange(0, WARPS)[:, None, None] * LANES
    lane_L = tl.arange(0, LANES)[None, None, :]
    mask_H = head_H1 < heads
    gain = tl.load(to_reduced_4H + head_H1, mask=mask_H, other=0.0)
    on_reduced = tl.load(to_reduced_4H + heads + head_H1, mask=mask_H, other=0.0)
    on_map = tl.load(to_reduced_4H + 2 * heads + head_H1, mask=mask_H, other=0.0)
    level = tl.load(to_reduced_4H + 3 * heads + head_H1, mask=mask_H, other=0.0)
    map_H1, reduced_H1 = map_BHNN + first + head_H1 * AREA, reduced_BHNN + first + head_H1 * AREA
    dt_H1 = dt_BHNN + first + head_H1 * AREA
    d_reduce, sums0, sums1 = tl.tuple(()), tl.tuple(()), tl.tuple(())
    for _ in tl.static_range(GROUPS):
        d_reduce += (zero_sums([WARPS, GROUP, PADDED], map_BHNN.dtype.element_ty),)
        sums0 += (zero_sums([WARPS, GROUP], map_BHNN.dtype.element_ty),)
        sums1 += (zero_sums([WARPS, GROUP], map_BHNN.dtype.element_ty),)
    for step in range(STEPS):
        start = (part * STEPS + step) * WARPS * LANES
        stored_L = start + cut_L + lane_L < AREA
        dh3_HL = _reduced_gradient(
            map_H1, reduced_H1, dt_H1, start, lane_L, cut_L, mask_H & stored_L, gain, on_reduced, on_map, level,
            mask_BN, image, TOKENS, STRIDE, MASKED,
        )  # fmt: skip
        d_reduce_next, sums0_next, sums1_next = tl.tuple(()), tl.tuple(()), tl.tuple(())
        for group in tl.static_range(GROUPS):
            map_G1 = start_G + group * GROUP + map_G[None, :, None]
            local_G1, m2_G1 = local_BENN + first_expanded + map_G1 * AREA, m2_BENN + first_expanded + map_G1 * AREA
            u2_GL, m2_GL, local_GL = _expanded_gradient(
                local_G1 + start + lane_L + cut_L, m2_G1 + start + lane_L + cut_L, stored_L, norm_2E, reduce_HE,
                map_G1, head_H, dh3_HL, heads, expanded, WARPS, GROUP, PADDED, PRECISION,
            )  # fmt: skip
            d_reduce_next += (
                tl.dot(
                    u2_GL, tl.permute(dh3_HL, (0, 2, 1)), d_reduce[group], input_precision=PRECISION,
                    out_dtype=dh3_HL.dtype,
                ),
            )  # fmt: skip
            sums0_next += (sums0[group] + tl.sum(m2_GL, 2),)
            sums1_next += (sums1[group] + tl.sum(m2_GL * local_GL, 2),)
        d_reduce, sums0, sums1 = d_reduce_next, sums0_next, sums1_next
    program, padded = image.to(tl.int64) * tl.num_programs(1) + part, tl.num_programs(2) * GROUPS * GROUP
    for group in tl.static_range(GROUPS):
        entry_G = start_G + group * GROUP + map_G
        entry_GH = entry_G[:, None] * PADDED + head_H[None, :]
        tl.store(d_reduce_PEH + program * padded * PADDED + entry_GH, tl.sum(d_reduce[group], 0))
        tl.store(sums_P2E + program * 2 * padded + entry_G, tl.sum(sums0[group], 0))
        tl.store(sums_P2E + (program * 2 + 1) * padded + entry_G, tl.sum(sums1[group], 0))


def bwd_reduce(
    map_BHNN: Tensor,
    reduced_BHNN: Tensor,
    dt_BHNN: Tensor,
    local_BENN: Tensor,
    to_reduced: Iterable[Tensor],
    gain2_E: Tensor,
    shift2_E: Tensor,
    mean2_E: Tensor,
    reduce_HE: Tensor,
    mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass 2.

    Reads A, h3, ∂T and h2 and writes m2: 3 + 2E/H entries per entry of A.

    Args:
        map_BHNN, reduced_BHNN, dt_BHNN, local_BENN: A, h3, ∂T and h2, one dtype.
        to_reduced: coefficients of ∂T, h3 and A in ∂h3, and a constant, each [H].
        gain2_E, shift2_E: norm 2 as an affine map.
        mean2_E: the mean of h2.
        reduce_HE: the reduction.
        mask_BN: which tokens are real, bool.
    Returns:
        m2, [B, E, N, N] in the maps' dtype; ∂reduce [H, E]; the sums of m2 and of m2·(h2 − mean), [E]; float64.
    """
    map_BHNN, reduced_BHNN, dt_BHNN, local_BENN = map(to_padded, (map_BHNN, reduced_BHNN, dt_BHNN, local_BENN))
    batch, heads, tokens, _ = map_BHNN.shape
    expanded, stride, padded = local_BENN.shape[1], row_stride(tokens), padded_size(heads)
    parts, groups = triton.cdiv(tokens * stride, STEPS * WARPS * LANES), triton.cdiv(expanded, GROUP)
    shares = triton.cdiv(groups * padded, GROUPS * 16)  # of the groups, one for each program
    groups = triton.cdiv(groups, shares)
    m2_BENN, precision = empty_padded(local_BENN), statistics_dtype(map_BHNN.dtype)
    d_reduce_PEH = map_BHNN.new_empty(batch * parts, shares * groups * GROUP, padded, dtype=precision)
    sums_P2E = map_BHNN.new_empty(batch * parts, 2, shares * groups * GROUP, dtype=precision)
    launch(
        _bwd_reduce, (batch, parts, shares), map_BHNN, reduced_BHNN, dt_BHNN, local_BENN,
        to_columns(to_reduced, precision), to_columns((gain2_E, shift2_E), precision),
        reduce_HE.to(precision).contiguous(), m2_BENN, d_reduce_PEH, sums_P2E, heads, expanded,
        sums_P2E if mask_BN is None else mask_bytes(mask_BN),
        TOKENS=tokens, STRIDE=stride, PADDED=padded, GROUPS=groups, GROUP=GROUP, WARPS=WARPS, LANES=LANES, STEPS=STEPS,
        PRECISION=product_precision(map_BHNN), MASKED=mask_BN is not None, num_warps=WARPS,
    )  # fmt: skip
    d_reduce_HE = d_reduce_PEH.sum(0, dtype=torch.float64)[:expanded, :heads].T
    q0_E, q1_E = sums_P2E.sum(0, dtype=torch.float64)[:, :expanded]
    return m2_BENN, d_reduce_HE, q0_E, q1_E - mean2_E * q0_E


def product_precision(map_BHNN: Tensor) -> str:
    """The precision of fp32 products of stored maps: no finer than the maps are stored, where a card has less."""
    card = architecture(map_BHNN.device)
    if map_BHNN.dtype == torch.float64:
        return "ieee"
    if isinstance(card, str) and (card != "gfx942" or map_BHNN.dtype == torch.float32):
        return "ieee"  # an AMD card multiplies fp32 as it is; of them an MI300 alone has tf32
    return "tf32x3" if map_BHNN.dtype == torch.float32 else "tf32"


# -- pass 4 --------------------------------------------------------------------------------------------------------


@triton.jit
def _bwd_map_statistics(
    map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN, columns_3H, gain_HH, heads,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head_H, offset_L = tl.arange(0, PADDED), part * POSITIONS + tl.arange(0, POSITIONS)
    mask_H = head_H < heads
    entry_HH, mask_HH = head_H[:, None] * heads + head_H[None, :], mask_H[:, None] & mask_H[None, :]
    gain_HH = tl.load(gain_HH + entry_HH, mask=mask_HH, other=0.0)
    gain_H1 = tl.load(columns_3H + head_H, mask=mask_H, other=0.0)[:, None]
    on_reduced_H1 = tl.load(columns_3H + heads + head_H, mask=mask_H, other=0.0)[:, None]
    level_H1 = tl.load(columns_3H + 2 * heads + head_H, mask=mask_H, other=0.0)[:, None]
    AREA: tl.constexpr = TOKENS * STRIDE
    first = image * heads * AREA
    offset_HL = head_H[:, None] * AREA + offset_L[None, :]
    stored_HL = mask_H[:, None] & (offset_L[None, :] < AREA)
    map_HL = tl.load(map_BHNN + first + offset_HL, mask=stored_HL, other=0.0)
    reduced_HL = as_sum(tl.load(reduced_BHNN + first + offset_HL, mask=stored_HL, other=0.0))
    dt_HL = as_sum(tl.load(dt_BHNN + first + offset_HL, mask=stored_HL, other=0.0))
    share_HL = as_sum(tl.load(share_BHNN + first + offset_HL, mask=stored_HL, other=0.0))
    if map_HL.dtype == tl.float16:
        map_HL = map_HL.to(tl.float32)  # its smallest numbers are too large for the gain
    d_map_HL = share_HL + gain_H1 * dt_HL + on_reduced_H1 * reduced_HL + level_H1
    d_map_HL = tl.where((offset_L % STRIDE < TOKENS)[None, :], dot_split_weight(gain_HH, map_HL, d_map_HL), 0.0)
    tl.store(share_BHNN + first + offset_HL, d_map_HL.to(share_BHNN.dtype.element_ty), mask=stored_HL)


def bwd_map_statistics(
    map_BHNN: Tensor,
    reduced_BHNN: Tensor,
    dt_BHNN: Tensor,
    share_BHNN: Tensor,
    to_map: Iterable[Tensor],
    gain_HH: Tensor,
    level_H: Tensor,
) -> Tensor:
    """Pass 4: the gradient of A, written over the share through the expanded maps.

    Reads A, h3, ∂T and the share and writes ∂A: 5 entries per entry of A.

    Args:
        map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN: A, h3, ∂T and the share, one dtype.
        to_map: coefficients of ∂T, h3 and A in the direct share of ∂A, and a constant, each [H].
        gain_HH, level_H: the share through norm 1's statistics, gain·A + level.
    Returns:
        ∂A, in the share's memory if that is padded.
    """
    map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN = map(to_padded, (map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN))
    batch, heads, tokens, _ = map_BHNN.shape
    stride = row_stride(tokens)
    precision, (gain_H, on_reduced_H, on_map_H, direct_H) = statistics_dtype(map_BHNN.dtype), to_map
    launch(
        _bwd_map_statistics, (batch, triton.cdiv(tokens * stride, POSITIONS)),
        map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN,
        to_columns((gain_H, on_reduced_H, direct_H + level_H), precision),
        (gain_HH + on_map_H.diag()).to(precision), heads,
        TOKENS=tokens, STRIDE=stride, PADDED=padded_size(heads), POSITIONS=POSITIONS, num_warps=4,
    )  # fmt: skip
    return share_BHNN
