"""Neighbouring keys in one thread: how kernels convolve along the keys without shared memory.

Tensor cores hand each thread of four two adjacent columns of every eighth of a tile. A tile's columns here are not keys
in order: they are dealt so that what a thread gets is a span, K keys in a row, and K − 2 of its neighbours are its own.

    columns 0 … 7    keys 0, 1 of span 0, of span 1, of span 2, of span 3
            8 … 15   keys 2, 3 of span 0 …
    edges   0 … 7    the key before span 0, the key behind it, the key before span 1 …

Only the two edges of a span are worked out twice, by it and by its neighbour. Spans are numbered through all images of
a batch, S / K an image, so that few columns fall outside whatever N is; those behind a row's last key lie on its zeros.
Axes: M maps (or heads), L columns of a tile, Q its edges, K keys of a span (4 or 8), S entries from row to row.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["SPANS", "edge_places", "neighbours", "span_places"]

SPANS = 4  # of a tile of one warp: the threads that share a row of a product

_SPANS = tl.constexpr(SPANS)


@triton.jit
def span_places(tile, total, TOKENS: tl.constexpr, STRIDE: tl.constexpr, KEYS: tl.constexpr):
    """Of every column: image, key, whether it is in memory, and whether it is one; ``total`` counts a batch's spans."""
    column_L = tl.arange(0, _SPANS * KEYS)
    span_L = tile * _SPANS + column_L // 2 % _SPANS
    PER_IMAGE: tl.constexpr = STRIDE // KEYS
    key_L = span_L % PER_IMAGE * KEYS + column_L // (2 * _SPANS) * 2 + column_L % 2
    stored_L = span_L < total
    return (span_L // PER_IMAGE).to(tl.int64), key_L, stored_L, stored_L & (key_L < TOKENS)


@triton.jit
def edge_places(tile, total, TOKENS: tl.constexpr, STRIDE: tl.constexpr, KEYS: tl.constexpr):
    """Of every edge: image, key, and whether there is one."""
    column_Q = tl.arange(0, 2 * _SPANS)
    span_Q = tile * _SPANS + column_Q // 2
    PER_IMAGE: tl.constexpr = STRIDE // KEYS
    key_Q = span_Q % PER_IMAGE * KEYS - 1 + column_Q % 2 * (KEYS + 1)
    return (span_Q // PER_IMAGE).to(tl.int64), key_Q, (span_Q < total) & (key_Q >= 0) & (key_Q < TOKENS)


@triton.jit
def neighbours(wide_ML, edge_MQ, MAPS: tl.constexpr, KEYS: tl.constexpr):
    """Each column's neighbour at the key before, and at the key behind, both [M, L]; registers are only renamed."""
    pairs = tl.permute(tl.reshape(wide_ML, [MAPS, KEYS // 2, _SPANS, 2]), (0, 2, 1, 3))
    even, odd = tl.split(pairs)
    first, last = tl.split(tl.reshape(edge_MQ, [MAPS, _SPANS, 2]))
    if KEYS == 4:
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        before, behind = tl.join(first, odd0), tl.join(even1, last)
    else:
        tl.static_assert(KEYS == 8)
        even02, even13 = tl.split(tl.reshape(even, [MAPS, _SPANS, 2, 2]))
        odd02, odd13 = tl.split(tl.reshape(odd, [MAPS, _SPANS, 2, 2]))
        even0, even2 = tl.split(even02)
        even1, even3 = tl.split(even13)
        odd0, odd2 = tl.split(odd02)
        odd1, odd3 = tl.split(odd13)
        before = tl.reshape(tl.join(tl.join(first, odd1), tl.join(odd0, odd2)), [MAPS, _SPANS, 4])
        behind = tl.reshape(tl.join(tl.join(even1, even3), tl.join(even2, last)), [MAPS, _SPANS, 4])
    left = tl.permute(tl.join(before, even), (0, 2, 1, 3))
    right = tl.permute(tl.join(odd, behind), (0, 2, 1, 3))
    return tl.reshape(left, [MAPS, _SPANS * KEYS]), tl.reshape(right, [MAPS, _SPANS * KEYS])
