"""Padded sequences in kernels: which tokens, and which entries of a map, are real.

    real_tokens    of some tokens, images anyhow
    real_entries   of some entries of one image's map, by where they lie in padded memory
    count_of       what a sum is divided by, where all that was counted may be padding

A kernel is given a mask as bytes, [B, N], and a constant, MASKED, that says so; without one it is compiled as if there
were no padding, and does not load these.
Axes: B batch, N tokens, L any number of tokens or entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["count_of", "real_entries", "real_tokens"]


@triton.jit
def real_tokens(mask_BN, image, token_L, valid_L, TOKENS: tl.constexpr):
    """Which of some tokens are neither padding nor, where ``valid_L`` is false, outside."""
    return tl.load(mask_BN + image * TOKENS + token_L, mask=valid_L, other=0) != 0


@triton.jit
def real_entries(mask_BN, image, offset_L, valid_L, TOKENS: tl.constexpr, STRIDE: tl.constexpr):
    """Which entries of an image's map have a real query and a real key."""
    query_L = real_tokens(mask_BN, image, offset_L // STRIDE, valid_L, TOKENS)
    return query_L & real_tokens(mask_BN, image, offset_L % STRIDE, valid_L, TOKENS)


@triton.jit
def count_of(count, MASKED: tl.constexpr):
    """A count to divide a sum by: of nothing but padding both are zero, and so is the mean."""
    if MASKED:
        return tl.maximum(count, 1)
    else:
        return count
