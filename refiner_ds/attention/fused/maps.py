"""Making a map from queries and keys in one kernel, and the way back in two; no logits and no softmax are written.

    q, k (+ the map handed on) ──> A = softmax(scale·QKᵀ) + scale·A_before, dropped out, and each row's log-sum-exp
    ∂A, q, k, log-sum-exps ──> ∂q (and ∂A_before) row by row, then ∂k column by column, softmax made again in both

Bytes of maps that move, of two-byte entries: forward 2 written (and 2 read of the map handed on), backward 4 read (and
2 written for the map handed on); a row of tiles that is gone over twice comes from cache the second time.
Axes: B batch, H heads, N tokens, d head width; R, K the rows and keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refiner_ds.attention.fused.launching import launch
from refiner_ds.attention.fused.tools import at_least_16, product, readable
from refiner_ds.attention.parameters import Scores

__all__ = ["make_map", "score_gradients", "softmax_map"]

# Queries and keys of a tile: compiled for Hopper in bf16, heads of 32 take 94, 124 and 88 registers and four programs
# share a processor; with 64 keys it is two, and backward spills in fp32.
ROWS = 64
KEYS = 32


@triton.jit
def _vectors(x_BHNd, image, head, place_L, strides, tokens, width, WIDTH: tl.constexpr):
    """Some tokens' queries or keys, [L, WIDTH], zero outside."""
    at_d = tl.arange(0, WIDTH)
    start = x_BHNd + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    here_Ld = (place_L[:, None] < tokens) & (at_d[None, :] < width)
    return tl.load(start + place_L[:, None] * strides[2] + at_d[None, :], mask=here_Ld, other=0.0)


@triton.jit
def _kept(seed, plane, row_R, key_K, tokens, dropout):
    """What dropout multiplies entries with; every pass draws the same."""
    drawn_RK = tl.rand(seed + plane, row_R[:, None] * tokens + key_K[None, :])
    return tl.where(drawn_RK >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _softmax_map(
    q_BHNd, k_BHNd, handed_BHNN, map_BHNN, lse_BHN, q_strides, k_strides, scale, dropout, seed, heads, tokens, width,
    HANDED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    entries = plane.to(tl.int64) * tokens * tokens
    handed_BHNN, map_BHNN = handed_BHNN + entries, map_BHNN + entries
    row_R, key_K = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, tokens, width, WIDTH)
    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, KEYS):
        here_K = start + key_K < tokens
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, tokens, width, WIDTH)
        logits_RK = tl.where(here_K[None, :], product(q_Rd, tl.trans(k_Kd)) * scale, float("-inf"))
        new_R = tl.maximum(most_R, tl.max(logits_RK, 1))
        sum_R = sum_R * tl.exp(most_R - new_R) + tl.sum(tl.exp(logits_RK - new_R[:, None]), 1)
        most_R = new_R
    lse_R = most_R + tl.log(sum_R)
    tl.store(lse_BHN + plane.to(tl.int64) * tokens + row_R, lse_R, mask=row_R < tokens)
    for start in range(0, tokens, KEYS):
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, tokens, width, WIDTH)
        entry_RK = tl.exp(product(q_Rd, tl.trans(k_Kd)) * scale - lse_R[:, None])
        here_RK = (row_R[:, None] < tokens) & (start + key_K[None, :] < tokens)
        place_RK = row_R[:, None] * tokens + start + key_K[None, :]
        if HANDED:
            entry_RK += scale * tl.load(handed_BHNN + place_RK, mask=here_RK, other=0.0).to(tl.float32)
        if DROPOUT:
            entry_RK *= _kept(seed, plane, row_R, start + key_K, tokens, dropout)
        tl.store(map_BHNN + place_RK, entry_RK.to(map_BHNN.dtype.element_ty), mask=here_RK)


@triton.jit
def _behind_softmax(
    q_Rd, k_Kd, lse_R, grad_NN, plane, row_R, key_K, scale, dropout, seed, tokens, DROPOUT: tl.constexpr
):
    """A tile of the softmax, and of the gradient behind it, zero outside; [R, K] both. ``grad_NN`` is its plane."""
    here_RK = (row_R[:, None] < tokens) & (key_K[None, :] < tokens)
    place_RK = row_R[:, None] * tokens + key_K[None, :]
    grad_RK = tl.load(grad_NN + place_RK, mask=here_RK, other=0.0).to(tl.float32)
    if DROPOUT:
        grad_RK *= _kept(seed, plane, row_R, key_K, tokens, dropout)
    softmax_RK = tl.exp(product(q_Rd, tl.trans(k_Kd)) * scale - lse_R[:, None])
    return tl.where(here_RK, softmax_RK, 0.0), grad_RK


@triton.jit
def _query_gradients(
    q_BHNd, k_BHNd, lse_BHN, grad_BHNN, dq_BHNd, handed_BHNN, mean_BHN, q_strides, k_strides, scale, dropout, seed,
    heads, tokens, width,
    HANDED: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    entries = plane.to(tl.int64) * tokens * tokens
    grad_BHNN, handed_BHNN = grad_BHNN + entries, handed_BHNN + entries
    row_R, key_K, at_d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, tokens, width, WIDTH)
    lse_R = tl.load(lse_BHN + plane.to(tl.int64) * tokens + row_R, mask=row_R < tokens, other=0.0)
    mean_R = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, KEYS):
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, tokens, width, WIDTH)
        softmax_RK, grad_RK = _behind_softmax(
            q_Rd, k_Kd, lse_R, grad_BHNN, plane, row_R, start + key_K, scale, dropout, seed, tokens, DROPOUT
        )
        mean_R += tl.sum(softmax_RK * grad_RK, 1)
        if HANDED:
            here_RK = (row_R[:, None] < tokens) & (start + key_K[None, :] < tokens)
            place_RK = row_R[:, None] * tokens + start + key_K[None, :]
            tl.store(handed_BHNN + place_RK, (scale * grad_RK).to(handed_BHNN.dtype.element_ty), mask=here_RK)
    tl.store(mean_BHN + plane.to(tl.int64) * tokens + row_R, mean_R, mask=row_R < tokens)
    dq_Rd = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, tokens, KEYS):
        k_Kd = _vectors(k_BHNd, image, head, start + key_K, k_strides, tokens, width, WIDTH)
        softmax_RK, grad_RK = _behind_softmax(
            q_Rd, k_Kd, lse_R, grad_BHNN, plane, row_R, start + key_K, scale, dropout, seed, tokens, DROPOUT
        )
        logits_RK = (grad_RK - mean_R[:, None]) * softmax_RK
        dq_Rd += product(logits_RK.to(k_Kd.dtype), k_Kd)
    place_Rd = (plane.to(tl.int64) * tokens + row_R[:, None]) * width + at_d[None, :]
    here_Rd = (row_R[:, None] < tokens) & (at_d[None, :] < width)
    tl.store(dq_BHNd + place_Rd, (dq_Rd * scale).to(dq_BHNd.dtype.element_ty), mask=here_Rd)


@triton.jit
def _key_gradients(
    q_BHNd, k_BHNd, lse_BHN, grad_BHNN, dk_BHNd, mean_BHN, q_strides, k_strides, scale, dropout, seed,
    heads, tokens, width,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0), tl.program_id(1)
    image, head = plane // heads, plane % heads
    grad_BHNN += plane.to(tl.int64) * tokens * tokens
    key_K, offset_R, at_d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    k_Kd = _vectors(k_BHNd, image, head, key_K, k_strides, tokens, width, WIDTH)
    dk_Kd = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, tokens, ROWS):
        row_R = start + offset_R
        q_Rd = _vectors(q_BHNd, image, head, row_R, q_strides, tokens, width, WIDTH)
        lse_R = tl.load(lse_BHN + plane.to(tl.int64) * tokens + row_R, mask=row_R < tokens, other=0.0)
        mean_R = tl.load(mean_BHN + plane.to(tl.int64) * tokens + row_R, mask=row_R < tokens, other=0.0)
        softmax_RK, grad_RK = _behind_softmax(
            q_Rd, k_Kd, lse_R, grad_BHNN, plane, row_R, key_K, scale, dropout, seed, tokens, DROPOUT
        )
        logits_RK = (grad_RK - mean_R[:, None]) * softmax_RK
        dk_Kd += product(tl.trans(logits_RK.to(q_Rd.dtype)), q_Rd)
    place_Kd = (plane.to(tl.int64) * tokens + key_K[:, None]) * width + at_d[None, :]
    here_Kd = (key_K[:, None] < tokens) & (at_d[None, :] < width)
    tl.store(dk_BHNd + place_Kd, (dk_Kd * scale).to(dk_BHNd.dtype.element_ty), mask=here_Kd)


def softmax_map(
    q_BHNd: Tensor, k_BHNd: Tensor, scale: float, handed_BHNN: Tensor | None = None, dropout: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """softmax(scale·QKᵀ) + scale·handed, dropped out: [B, H, N, N] in the queries' dtype; log-sum-exps [B, H, N], fp32.

    Args:
        q_BHNd, k_BHNd: queries and keys in one dtype, fp32 or half precision.
        scale: factor on the logits, and on the map handed on.
        handed_BHNN: the map of the block before, or ``None``.
        dropout, seed: probability below 1 that an entry is dropped, and what it is drawn from.
    """
    batch, heads, tokens, width = q_BHNd.shape
    q_BHNd, k_BHNd = readable(q_BHNd), readable(k_BHNd)
    map_BHNN = q_BHNd.new_empty(batch, heads, tokens, tokens)
    lse_BHN = q_BHNd.new_empty(batch, heads, tokens, dtype=torch.float32)
    handed = map_BHNN if handed_BHNN is None else handed_BHNN.contiguous()
    launch(
        _softmax_map, (batch * heads, triton.cdiv(tokens, ROWS)), q_BHNd, k_BHNd, handed, map_BHNN, lse_BHN,
        q_BHNd.stride()[:3], k_BHNd.stride()[:3], scale, dropout, seed, heads, tokens, width,
        HANDED=handed_BHNN is not None, DROPOUT=dropout > 0, ROWS=ROWS, KEYS=KEYS, WIDTH=at_least_16(width),
        num_warps=4,
    )  # fmt: skip
    return map_BHNN, lse_BHN


def score_gradients(
    q_BHNd: Tensor, k_BHNd: Tensor, lse_BHN: Tensor, scale: float, grad_BHNN: Tensor,
    handed: torch.dtype | None = None, dropout: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The way back through :func:`softmax_map`, ∂q and ∂k [B, H, N, d], and ∂handed in the dtype ``handed`` if given.

    Args:
        q_BHNd, k_BHNd, scale, dropout, seed: as there.
        lse_BHN: the log-sum-exps that came out there.
        grad_BHNN: the gradient of the map.
    """
    batch, heads, tokens, width = q_BHNd.shape
    q_BHNd, k_BHNd, grad_BHNN = readable(q_BHNd), readable(k_BHNd), grad_BHNN.contiguous()
    dq_BHNd, dk_BHNd = (x.new_empty(batch, heads, tokens, width) for x in (q_BHNd, k_BHNd))
    d_handed_BHNN = None if handed is None else torch.empty_like(grad_BHNN, dtype=handed)
    mean_BHN = torch.empty_like(lse_BHN)
    numbers = (q_BHNd.stride()[:3], k_BHNd.stride()[:3], scale, dropout, seed, heads, tokens, width)
    constants = {"DROPOUT": dropout > 0, "ROWS": ROWS, "KEYS": KEYS, "WIDTH": at_least_16(width), "num_warps": 4}
    launch(
        _query_gradients, (batch * heads, triton.cdiv(tokens, ROWS)), q_BHNd, k_BHNd, lse_BHN, grad_BHNN, dq_BHNd,
        grad_BHNN if d_handed_BHNN is None else d_handed_BHNN, mean_BHN, *numbers, HANDED=handed is not None,
        **constants,
    )  # fmt: skip
    launch(
        _key_gradients, (batch * heads, triton.cdiv(tokens, KEYS)), q_BHNd, k_BHNd, lse_BHN, grad_BHNN, dk_BHNd,
        mean_BHN, *numbers, **constants,
    )  # fmt: skip
    return dq_BHNd, dk_BHNd, d_handed_BHNN


class _MakeMap(torch.autograd.Function):
    """(q, k, map handed on or None) to the map; keeps q, k and the log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, q_BHNd: Tensor, k_BHNd: Tensor, handed_BHNN: Tensor | None, scale: float, dropout: float, seed: int
    ) -> Tensor:
        map_BHNN, lse_BHN = softmax_map(q_BHNd, k_BHNd, scale, handed_BHNN, dropout, seed)
        ctx.save_for_backward(q_BHNd, k_BHNd, lse_BHN)
        ctx.how = scale, dropout, seed
        ctx.handed = None if handed_BHNN is None else handed_BHNN.dtype
        return map_BHNN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHNN: Tensor) -> tuple[Tensor | None, ...]:
        scale, dropout, seed = ctx.how
        q_BHNd, k_BHNd, lse_BHN = ctx.saved_tensors
        grads = score_gradients(q_BHNd, k_BHNd, lse_BHN, scale, grad_BHNN, ctx.handed, dropout, seed)
        return *grads, None, None, None


def make_map(scores: Scores, handed_BHNN: Tensor | None = None) -> Tensor:
    """As ``composed.make_map``, [B, H, N, N] in the queries' dtype, keeping q, k and the log-sum-exps for backward.

    Dropout draws one seed from torch's global CPU generator, so that checkpointing repeats it; with probability 1
    nothing is left of the map.
    """
    if scores.dropout >= 1:
        return make_map(scores._replace(dropout=0.0), handed_BHNN) * 0
    seed = int(torch.randint(2**30, ())) if scores.dropout else 0
    return _MakeMap.apply(scores.q_BHNd, scores.k_BHNd, handed_BHNN, scores.scale, scores.dropout, seed)
