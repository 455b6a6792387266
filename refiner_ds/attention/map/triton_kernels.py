"""The attention map by one kernel, and its backward by two; neither logits nor softmax are written.

    q, k (+ the residual map) ──> A = softmax(scale·QKᵀ) + scale·A_before, dropped out, and each row's log-sum-exp
    ∂A, q, k, log-sum-exps ──> ∂q (and ∂A_before) row by row, then ∂k column by column, softmax made again in both

Bytes of maps that move, of two-byte entries: forward 2 written (and 2 read of the residual map), backward 4 read (and
2 written for the residual map); a row of tiles that is gone over twice comes from cache the bwd_reduce time.
Axes: B batch, H heads, N tokens, d head width; R, K the rows and keys of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from refiner_ds.attention.kernels.dot import as_sum, dense_rows, dot, padded_size, zero_sums
from refiner_ds.attention.kernels.launch import launch
from refiner_ds.attention.kernels.masks import real_tokens
from refiner_ds.attention.kernels.padded import empty_padded, is_padded, row_stride, to_padded
from refiner_ds.attention.masking import mask_bytes
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["score_gradients", "softmax_map"]

# Queries and keys of a tile: compiled for Hopper in bf16, the kernels take 64, 88 and 102 registers for heads of 32, so
# that four programs or more fit on a multiprocessor. With 128 queries it would be a fifth fewer instructions but three
# programs, and fp32 would spill half a KB.
ROWS = 64
KEYS = 32

_LOG2_E = tl.constexpr(math.log2(math.e))  # 2ˣ is one instruction, eˣ five


@triton.jit
def _vectors(x_BHNd, image, head, offset_L, strides, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Some tokens' queries, keys or values, [L, WIDTH], zero outside."""
    at_d = tl.arange(0, WIDTH)
    start = x_BHNd + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    valid_Ld = (offset_L[:, None] < TOKENS) & (at_d[None, :] < width)
    return tl.load(start + offset_L[:, None] * strides[2] + at_d[None, :], mask=valid_Ld, other=0.0)


@triton.jit
def _logits(q_Rd, k_Kd, scale):
    """Logits to base 2, [R, K]."""
    return dot(q_Rd, tl.trans(k_Kd)) * (scale * _LOG2_E)


@triton.jit
def _dropout_factor(seed, plane, row_R, key_K, dropout, TOKENS: tl.constexpr):
    """Factors of dropout, the same in every pass."""
    drawn_RK = tl.rand(seed + plane, row_R[:, None] * TOKENS + key_K[None, :])
    return tl.where(drawn_RK >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _real(mask_BN, image, token_L, TOKENS: tl.constexpr):
    """Which of some tokens are neither outside nor padding, [L]; where nothing is padded it is not called."""
    return real_tokens(mask_BN, image.to(tl.int64), token_L, token_L < TOKENS, TOKENS)


@triton.jit
def _softmax_map(
    q_BHNd, k_BHNd, residual_BHNN, map_BHNN, lse_BHN, mask_BN, q_strides, k_strides, scale, dropout, seed, heads, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    entries = plane.to(tl.int64) * (TOKENS * STRIDE)
    residual_BHNN, map_BHNN = residual_BHNN + entries, map_BHNN + entries
    row_R, key_K = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, width, TOKENS, WIDTH)
    sum_R = zero_sums([ROWS], q_BHNd.dtype.element_ty)
    max_R = tl.full([ROWS], float("-inf"), sum_R.dtype)
    for start in range(0, TOKENS, KEYS):
        valid_K = start + key_K < TOKENS
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, width, TOKENS, WIDTH)
        logits_RK = tl.where(valid_K[None, :], _logits(q_Rd, k_Kd, scale), float("-inf"))
        if MASKED:
            # Finite, or the difference of two maxima would be NaN where a row begins with padding.
            logits_RK = tl.where(_real(mask_BN, image, start + key_K, TOKENS)[None, :], logits_RK, -1e30)
        new_R = tl.maximum(max_R, tl.max(logits_RK, 1))
        sum_R = sum_R * tl.exp2(max_R - new_R) + tl.sum(tl.exp2(logits_RK - new_R[:, None]), 1)
        max_R = new_R
    lse_R = max_R + tl.log2(sum_R)
    if MASKED:
        # Of padding: whatever is made again from it is zero.
        lse_R = tl.where(_real(mask_BN, image, row_R, TOKENS), lse_R, float("inf"))
    tl.store(lse_BHN + plane.to(tl.int64) * TOKENS + row_R, lse_R, mask=row_R < TOKENS)
    for start in range(0, TOKENS, KEYS):
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, width, TOKENS, WIDTH)
        entry_RK = tl.exp2(_logits(q_Rd, k_Kd, scale) - lse_R[:, None])
        stored_RK = (row_R[:, None] < TOKENS) & (start + key_K[None, :] < STRIDE)
        offset_RK = row_R[:, None] * STRIDE + start + key_K[None, :]
        if RESIDUAL:
            entry_RK += scale * as_sum(tl.load(residual_BHNN + offset_RK, mask=stored_RK, other=0.0))
        if DROPOUT:
            entry_RK *= _dropout_factor(seed, plane, row_R, start + key_K, dropout, TOKENS)
        entry_RK = tl.where(start + key_K[None, :] < TOKENS, entry_RK, 0.0)
        if MASKED:
            entry_RK = tl.where(_real(mask_BN, image, start + key_K, TOKENS)[None, :], entry_RK, 0.0)
        tl.store(map_BHNN + offset_RK, entry_RK.to(map_BHNN.dtype.element_ty), mask=stored_RK)


@triton.jit
def _softmax_gradient(
    q_Rd, k_Kd, lse_R, grad_NN, out_Rd, value_Kd, mask_BN, plane, heads, row_R, key_K, scale, dropout, seed,
    TOKENS: tl.constexpr, GRAD_STRIDE: tl.constexpr, ATTENDED: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of the softmax and of the gradient of its output, both [R, K]; ``grad_NN`` is the plane of this head.

    The gradient is zero outside the map, the softmax after its last key; rows outside are never used.
    """
    grad_RK = zero_sums([row_R.shape[0], key_K.shape[0]], q_Rd.dtype)
    if GRAD_STRIDE:
        stored_RK = (row_R[:, None] < TOKENS) & (key_K[None, :] < GRAD_STRIDE)
        offset_RK = row_R[:, None] * GRAD_STRIDE + key_K[None, :]
        grad_RK += as_sum(tl.load(grad_NN + offset_RK, mask=stored_RK, other=0.0))
    if ATTENDED:
        grad_RK += dot(out_Rd, tl.trans(value_Kd))
    if DROPOUT:
        grad_RK *= _dropout_factor(seed, plane, row_R, key_K, dropout, TOKENS)
    softmax_RK = tl.exp2(_logits(q_Rd, k_Kd, scale) - lse_R[:, None])
    if MASKED:
        softmax_RK = tl.where(_real(mask_BN, plane // heads, key_K, TOKENS)[None, :], softmax_RK, 0.0)
    return tl.where(key_K[None, :] < TOKENS, softmax_RK, 0.0), grad_RK


@triton.jit
def _softmax_gradient_of_keys(
    k_BHNd, value_BHNd, q_Rd, lse_R, grad_NN, out_Rd, mask_BN, plane, row_R, key_K, k_strides, value_strides,
    scale, dropout, seed, heads, width,
    TOKENS: tl.constexpr, GRAD_STRIDE: tl.constexpr, ATTENDED: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The keys of a tile, [K, d], and its `_softmax_gradient`."""
    image, head = plane // heads, plane % heads
    k_Kd = _vectors(k_BHNd, image, head, key_K, k_strides, width, TOKENS, WIDTH)
    value_Kd = _vectors(value_BHNd, image, head, key_K, value_strides, width, TOKENS, WIDTH)
    softmax_RK, grad_RK = _softmax_gradient(
        q_Rd, k_Kd, lse_R, grad_NN, out_Rd, value_Kd, mask_BN, plane, heads, row_R, key_K, scale, dropout, seed,
        TOKENS, GRAD_STRIDE, ATTENDED, DROPOUT, MASKED,
    )  # fmt: skip
    return k_Kd, softmax_RK, grad_RK


@triton.jit
def _query_gradients(
    q_BHNd, k_BHNd, lse_BHN, grad_BHNN, out_BHNd, value_BHNd, dq_BHNd, residual_BHNN, mean_BHN, mask_BN,
    q_strides, k_strides, out_strides, value_strides, scale, dropout, seed, heads, width,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr, ATTENDED: tl.constexpr,
    RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    grad_BHNN += plane.to(tl.int64) * (TOKENS * GRAD_STRIDE)
    residual_BHNN += plane.to(tl.int64) * (TOKENS * STRIDE)
    row_R, key_K, at_d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, width, TOKENS, WIDTH)
    out_Rd = _vectors(out_BHNd, image, head, row_R, out_strides, width, TOKENS, WIDTH)
    lse_R = tl.load(lse_BHN + plane.to(tl.int64) * TOKENS + row_R, mask=row_R < TOKENS, other=0.0)
    mean_R = zero_sums([ROWS], q_BHNd.dtype.element_ty)
    for start in range(0, TOKENS, KEYS):
        k_Kd, softmax_RK, grad_RK = _softmax_gradient_of_keys(
            k_BHNd, value_BHNd, q_Rd, lse_R, grad_BHNN, out_Rd, mask_BN, plane, row_R, start + key_K,
            k_strides, value_strides, scale, dropout, seed, heads, width,
            TOKENS, GRAD_STRIDE, ATTENDED, DROPOUT, MASKED, WIDTH,
        )  # fmt: skip
        mean_R += tl.sum(softmax_RK * grad_RK, 1)
        if RESIDUAL:
            stored_RK = (row_R[:, None] < TOKENS) & (start + key_K[None, :] < STRIDE)
            offset_RK = row_R[:, None] * STRIDE + start + key_K[None, :]
            tl.store(residual_BHNN + offset_RK, (scale * grad_RK).to(residual_BHNN.dtype.element_ty), mask=stored_RK)
    tl.store(mean_BHN + plane.to(tl.int64) * TOKENS + row_R, mean_R, mask=row_R < TOKENS)
    dq_Rd = zero_sums([ROWS, WIDTH], q_BHNd.dtype.element_ty)
    for start in range(0, TOKENS, KEYS):
        k_Kd, softmax_RK, grad_RK = _softmax_gradient_of_keys(
            k_BHNd, value_BHNd, q_Rd, lse_R, grad_BHNN, out_Rd, mask_BN, plane, row_R, start + key_K,
            k_strides, value_strides, scale, dropout, seed, heads, width,
            TOKENS, GRAD_STRIDE, ATTENDED, DROPOUT, MASKED, WIDTH,
        )  # fmt: skip
        logits_RK = (grad_RK - mean_R[:, None]) * softmax_RK
        dq_Rd += dot(logits_RK.to(k_Kd.dtype), k_Kd)
    offset_Rd = (plane.to(tl.int64) * TOKENS + row_R[:, None]) * width + at_d[None, :]
    valid_Rd = (row_R[:, None] < TOKENS) & (at_d[None, :] < width)
    tl.store(dq_BHNd + offset_Rd, (dq_Rd * scale).to(dq_BHNd.dtype.element_ty), mask=valid_Rd)


@triton.jit
def _key_gradients(
    q_BHNd, k_BHNd, lse_BHN, grad_BHNN, out_BHNd, value_BHNd, dk_BHNd, mean_BHN, mask_BN,
    q_strides, k_strides, out_strides, value_strides, scale, dropout, seed, heads, width,
    TOKENS: tl.constexpr, GRAD_STRIDE: tl.constexpr, ATTENDED: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    grad_BHNN += plane.to(tl.int64) * (TOKENS * GRAD_STRIDE)
    key_K, lane_R, at_d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    k_Kd = _vectors(k_BHNd, image, head, key_K, k_strides, width, TOKENS, WIDTH)
    value_Kd = _vectors(value_BHNd, image, head, key_K, value_strides, width, TOKENS, WIDTH)
    dk_Kd = zero_sums([KEYS, WIDTH], q_BHNd.dtype.element_ty)
    for start in range(0, TOKENS, ROWS):
        row_R = start + lane_R
        q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, width, TOKENS, WIDTH)
        out_Rd = _vectors(out_BHNd, image, head, row_R, out_strides, width, TOKENS, WIDTH)
        lse_R = tl.load(lse_BHN + plane.to(tl.int64) * TOKENS + row_R, mask=row_R < TOKENS, other=0.0)
        mean_R = tl.load(mean_BHN + plane.to(tl.int64) * TOKENS + row_R, mask=row_R < TOKENS, other=0.0)
        softmax_RK, grad_RK = _softmax_gradient(
            q_Rd, k_Kd, lse_R, grad_BHNN, out_Rd, value_Kd, mask_BN, plane, heads, row_R, key_K, scale, dropout, seed,
            TOKENS, GRAD_STRIDE, ATTENDED, DROPOUT, MASKED,
        )  # fmt: skip
        logits_RK = (grad_RK - mean_R[:, None]) * softmax_RK
        dk_Kd += dot(tl.trans(logits_RK.to(q_Rd.dtype)), q_Rd)
    offset_Kd = (plane.to(tl.int64) * TOKENS + key_K[:, None]) * width + at_d[None, :]
    valid_Kd = (key_K[:, None] < TOKENS) & (at_d[None, :] < width)
    tl.store(dk_BHNd + offset_Kd, (dk_Kd * scale).to(dk_BHNd.dtype.element_ty), mask=valid_Kd)


def softmax_map(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    scale: float,
    residual_BHNN: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale·QKᵀ) + scale·residual, dropped out: [B, H, N, N] in the queries' dtype; and row log-sum-exps,
    [B, H, N] fp32, to base 2.

    Args:
        q_BHNd, k_BHNd: queries and keys in one dtype, fp32 or half precision; in the interpreter float64 too.
        scale: factor on the logits, and on the residual map.
        residual_BHNN: the map of the block before, or ``None``.
        dropout, seed: probability below 1 that an entry is dropped, and what it is drawn from.
        mask_BN: which tokens are real, bool; rows and columns of the others are zero, and their log-sum-exps infinite.
    """
    batch, heads, tokens, width = q_BHNd.shape
    q_BHNd, k_BHNd = dense_rows(q_BHNd), dense_rows(k_BHNd)
    map_BHNN = empty_padded(q_BHNd)
    lse_BHN = q_BHNd.new_empty(batch, heads, tokens, dtype=statistics_dtype(q_BHNd.dtype))
    residual = map_BHNN if residual_BHNN is None else to_padded(residual_BHNN)
    launch(
        _softmax_map, (batch * heads, triton.cdiv(tokens, ROWS)), q_BHNd, k_BHNd, residual, map_BHNN, lse_BHN,
        lse_BHN if mask_BN is None else mask_bytes(mask_BN), q_BHNd.stride()[:3], k_BHNd.stride()[:3],
        scale, dropout, seed, heads, width,
        TOKENS=tokens, STRIDE=row_stride(tokens), RESIDUAL=residual_BHNN is not None, DROPOUT=dropout > 0,
        MASKED=mask_BN is not None, ROWS=ROWS, KEYS=KEYS, WIDTH=padded_size(width), num_warps=4,
    )  # fmt: skip
    return map_BHNN, lse_BHN


def score_gradients(
    q_BHNd: Tensor, k_BHNd: Tensor, lse_BHN: Tensor, scale: float, grad_BHNN: Tensor | None,
    residual: torch.dtype | None = None, dropout: float = 0.0, seed: int = 0,
    attended: tuple[Tensor, Tensor] | None = None, mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The backward of :func:`softmax_map`: ∂q and ∂k, [B, H, N, d], and ∂residual in the dtype ``residual`` if given.

    Args:
        q_BHNd, k_BHNd, scale, dropout, seed, mask_BN: as there.
        lse_BHN: the log-sum-exps that came out there.
        grad_BHNN: the gradient of the map, or ``None`` if there is none but what follows.
        attended: the gradient of the map times values, and those values, both as queries in shape and dtype; what
            they add to the map's gradient is never written.
    """
    batch, heads, tokens, width = q_BHNd.shape
    q_BHNd, k_BHNd, stride = dense_rows(q_BHNd), dense_rows(k_BHNd), row_stride(tokens)
    out_BHNd, value_BHNd = (q_BHNd, k_BHNd) if attended is None else map(dense_rows, attended)
    grad_stride = 0
    if grad_BHNN is not None:
        # What autograd adds up is dense: reading that two bytes at a time costs less than a copy.
        grad_BHNN, grad_stride = (grad_BHNN, stride) if is_padded(grad_BHNN) else (grad_BHNN.contiguous(), tokens)
    dq_BHNd, dk_BHNd = (x.new_empty(batch, heads, tokens, width) for x in (q_BHNd, k_BHNd))
    d_residual_BHNN = None if residual is None else empty_padded(q_BHNd, dtype=residual)
    mean_BHN = torch.empty_like(lse_BHN)
    mask = lse_BHN if mask_BN is None else mask_bytes(mask_BN)
    read = (q_BHNd, k_BHNd, lse_BHN, lse_BHN if grad_BHNN is None else grad_BHNN, out_BHNd, value_BHNd)
    numbers = (
        *(x.stride()[:3] for x in (q_BHNd, k_BHNd, out_BHNd, value_BHNd)), scale, dropout, seed, heads, width,
    )  # fmt: skip
    constants = {
        "TOKENS": tokens, "GRAD_STRIDE": grad_stride, "ATTENDED": attended is not None, "DROPOUT": dropout > 0,
        "MASKED": mask_BN is not None, "ROWS": ROWS, "KEYS": KEYS, "WIDTH": padded_size(width), "num_warps": 4,
    }  # fmt: skip
    launch(
        _query_gradients, (batch * heads, triton.cdiv(tokens, ROWS)), *read, dq_BHNd,
        lse_BHN if d_residual_BHNN is None else d_residual_BHNN, mean_BHN, mask, *numbers, STRIDE=stride,
        RESIDUAL=residual is not None, **constants,
    )  # fmt: skip
    launch(
        _key_gradients, (batch * heads, triton.cdiv(tokens, KEYS)), *read, dk_BHNd, mean_BHN, mask, *numbers,
        **constants,
    )  # fmt: skip
    return dq_BHNd, dk_BHNd, d_residual_BHNN
