"""Every equation once more, as loops over single indices of numpy arrays: slow, and too simple to be wrong."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

Array = np.ndarray


def _indices(array: Array):
    return product(*(range(size) for size in array.shape))


def attention_map(q: Array, k: Array, scale: float) -> Array:
    batch, heads, tokens, width = q.shape
    out = np.zeros((batch, heads, tokens, tokens))
    for b, h, i in product(range(batch), range(heads), range(tokens)):
        powers = [math.exp(scale * sum(q[b, h, i, c] * k[b, h, j, c] for c in range(width))) for j in range(tokens)]
        for j in range(tokens):
            out[b, h, i, j] = powers[j] / sum(powers)
    return out


def accumulate(own: Array, residual: Array, scale: float) -> Array:
    out = np.zeros_like(own)
    for index in _indices(own):
        out[index] = own[index] + scale * residual[index]
    return out


def mix(maps: Array, weight: Array) -> Array:
    """Expansion and reduction alike: each new map is a linear combination of the old ones."""
    batch, _, rows, columns = maps.shape
    out = np.zeros((batch, weight.shape[0], rows, columns))
    for b, e, i, j in _indices(out):
        for h in range(weight.shape[1]):
            out[b, e, i, j] += weight[e, h] * maps[b, h, i, j]
    return out


def local(maps: Array, kernel: Array) -> Array:
    """Each map with its own kernel, nothing outside the map."""
    out = np.zeros_like(maps)
    rows, columns = kernel.shape[-2:]
    for (b, e, i, j), (y, x) in product(_indices(maps), product(range(rows), range(columns))):
        source_i, source_j = i + y - rows // 2, j + x - columns // 2
        if 0 <= source_i < maps.shape[2] and 0 <= source_j < maps.shape[3]:
            out[b, e, i, j] += kernel[e, 0, y, x] * maps[b, e, source_i, source_j]
    return out


def dense(maps: Array, kernel: Array) -> Array:
    out = np.zeros_like(maps)
    size = kernel.shape[-1]
    for (b, o, i, j), (h, y, x) in product(_indices(maps), product(range(maps.shape[1]), range(size), range(size))):
        source_i, source_j = i + y - size // 2, j + x - size // 2
        if 0 <= source_i < maps.shape[2] and 0 <= source_j < maps.shape[3]:
            out[b, o, i, j] += kernel[o, h, y, x] * maps[b, h, source_i, source_j]
    return out


def attend(maps: Array, value: Array) -> Array:
    batch, expanded, tokens, _ = maps.shape
    out = np.zeros((batch, expanded, tokens, value.shape[-1]))
    for b, e, i, c in _indices(out):
        head = e * value.shape[1] // expanded
        for j in range(tokens):
            out[b, e, i, c] += maps[b, e, i, j] * value[b, head, j, c]
    return out


def moments(maps: Array) -> tuple[Array, Array]:
    count = maps.shape[0] * maps.shape[2] * maps.shape[3]
    mean, variance = np.zeros(maps.shape[1]), np.zeros(maps.shape[1])
    for b, c, i, j in _indices(maps):
        mean[c] += maps[b, c, i, j] / count
    for b, c, i, j in _indices(maps):
        variance[c] += (maps[b, c, i, j] - mean[c]) ** 2 / count
    return mean, variance


def normalize(maps: Array, weight: Array, bias: Array, mean: Array, variance: Array, eps: float) -> Array:
    out = np.zeros_like(maps)
    for b, c, i, j in _indices(maps):
        out[b, c, i, j] = (maps[b, c, i, j] - mean[c]) / math.sqrt(variance[c] + eps) * weight[c] + bias[c]
    return out


def relu6(maps: Array) -> Array:
    out = np.zeros_like(maps)
    for index in _indices(maps):
        out[index] = min(max(maps[index], 0.0), 6.0)
    return out


def over_grid(maps: Array, kernel: Array, grid: tuple[int, int], axis: str) -> Array:
    """Local attention among the patches of the keys' or the queries' grid; class tokens of that axis stay."""
    out = maps.copy()
    classes = maps.shape[2] - grid[0] * grid[1]
    rows, columns = kernel.shape[-2:]
    for b, e, i, j in _indices(maps):
        moving = (j if axis == "keys" else i) - classes
        if moving < 0:
            continue
        out[b, e, i, j] = 0.0
        for y, x in product(range(rows), range(columns)):
            row, column = moving // grid[1] + y - rows // 2, moving % grid[1] + x - columns // 2
            if 0 <= row < grid[0] and 0 <= column < grid[1]:
                source = classes + row * grid[1] + column
                entry = maps[b, e, i, source] if axis == "keys" else maps[b, e, source, j]
                out[b, e, i, j] += kernel[e, 0, y, x] * entry
    return out
