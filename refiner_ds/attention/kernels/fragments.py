"""Fragments of neighbouring keys in one thread: how kernels convolve along the keys without shared memory.

Tensor cores give each thread of four two adjacent columns of every eight of a tile. Here columns are permuted, so that
a thread holds a fragment: K consecutive keys, K − 2 of which have both neighbours in the same thread.

    columns 0 … 7    keys 0, 1 of fragment 0, of fragment 1, of fragment 2, of fragment 3
            8 … 15   keys 2, 3 of fragment 0 …
    halo    0 … 7    the key before fragment 0, the key after it, the key before fragment 1 …

Only the halo's two keys of a fragment are computed twice, by it and by its neighbour. Fragments are numbered through
all images of a batch, S / K for each, so that few columns are wasted whatever N is; those after a row's last key fall
on the zeros of its padding.
Axes: M maps (or heads), L columns of a tile, Q its halo, K keys of a fragment (4 or 8), S entries from row to row.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FRAGMENTS", "halo_offsets", "neighbours", "fragment_offsets"]

FRAGMENTS = 4  # of a tile of one warp: the threads that share a row of a product

_FRAGMENTS = tl.constexpr(FRAGMENTS)


@triton.jit
def fragment_offsets(tile, total, TOKENS: tl.constexpr, STRIDE: tl.constexpr, KEYS: tl.constexpr):
    """For each column: image, key, whether it is in memory (padding included), and whether it is a key.

    ``total`` is the number of fragments of the batch.
    """
    column_L = tl.arange(0, _FRAGMENTS * KEYS)
    fragment_L = tile * _FRAGMENTS + column_L // 2 % _FRAGMENTS
    PER_IMAGE: tl.constexpr = STRIDE // KEYS
    key_L = fragment_L % PER_IMAGE * KEYS + column_L // (2 * _FRAGMENTS) * 2 + column_L % 2
    stored_L = fragment_L < total
    return (fragment_L // PER_IMAGE).to(tl.int64), key_L, stored_L, stored_L & (key_L < TOKENS)


@triton.jit
def halo_offsets(tile, total, TOKENS: tl.constexpr, STRIDE: tl.constexpr, KEYS: tl.constexpr):
    """For each column of the halo: image, key, and whether it is a key."""
    column_Q = tl.arange(0, 2 * _FRAGMENTS)
    fragment_Q = tile * _FRAGMENTS + column_Q // 2
    PER_IMAGE: tl.constexpr = STRIDE // KEYS
    key_Q = fragment_Q % PER_IMAGE * KEYS - 1 + column_Q % 2 * (KEYS + 1)
    return (fragment_Q // PER_IMAGE).to(tl.int64), key_Q, (fragment_Q < total) & (key_Q >= 0) & (key_Q < TOKENS)


@triton.jit
def neighbours(x_ML, halo_MQ, MAPS: tl.constexpr, KEYS: tl.constexpr):
    """The neighbours at the key before and at the key after, both [M, L]; no data leaves its thread."""
    pairs = tl.permute(tl.reshape(x_ML, [MAPS, KEYS // 2, _FRAGMENTS, 2]), (0, 2, 1, 3))
    even, odd = tl.split(pairs)
    first, last = tl.split(tl.reshape(halo_MQ, [MAPS, _FRAGMENTS, 2]))
    if KEYS == 4:
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        before, after = tl.join(first, odd0), tl.join(even1, last)
    else:
        tl.static_assert(KEYS == 8)
        even02, even13 = tl.split(tl.reshape(even, [MAPS, _FRAGMENTS, 2, 2]))
        odd02, odd13 = tl.split(tl.reshape(odd, [MAPS, _FRAGMENTS, 2, 2]))
        even0, even2 = tl.split(even02)
        even1, even3 = tl.split(even13)
        odd0, odd2 = tl.split(odd02)
        odd1, odd3 = tl.split(odd13)
        before = tl.reshape(tl.join(tl.join(first, odd1), tl.join(odd0, odd2)), [MAPS, _FRAGMENTS, 4])
        after = tl.reshape(tl.join(tl.join(even1, even3), tl.join(even2, last)), [MAPS, _FRAGMENTS, 4])
    left = tl.permute(tl.join(before, even), (0, 2, 1, 3))
    right = tl.permute(tl.join(odd, after), (0, 2, 1, 3))
    return tl.reshape(left, [MAPS, _FRAGMENTS * KEYS]), tl.reshape(right, [MAPS, _FRAGMENTS * KEYS])
