"""Tiles of query rows: the pieces in which lean attention makes and forgets expanded maps.

    a map [B, H, N, N] ── tiles ──> some images whole, or some rows of one image, small enough for a cache
                                    └─ with the rows around them that a kernel reaches

A tile only says where work is cut; statistics are summed over all of them.
Axes: b images of a tile, R query rows of a tile, C maps, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["Tile", "convolve", "kernel_gradient", "tiles"]

# Bytes of one expanded tile in fp32. On CPU a few of them should stay in the second-level cache and its neighbour; on
# GPU they should be large enough for the kernels to fill the card.
CPU_TILE_BYTES = 2**21
GPU_TILE_BYTES = 2**29


class Tile(NamedTuple):
    """Where a piece of work lies.

    Args:
        images: which images.
        rows: the query rows that are made.
        reach: those rows and the ones a kernel reaches around them, inside the map.
        missing: how many rows of the kernel's reach lie outside the map, above and below.
    """

    images: slice
    rows: slice
    reach: slice
    missing: tuple[int, int]

    @property
    def inner(self) -> slice:
        """The made rows within the reach."""
        first = self.rows.start - self.reach.start
        return slice(first, first + self.rows.stop - self.rows.start)


def tiles(batch: int, tokens: int, maps: int, device: torch.device, radius: int = 0) -> Iterator[Tile]:
    """Cut ``maps`` maps of ``batch`` images into tiles, for kernels that reach ``radius`` rows to either side."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    row_bytes = 4 * maps * tokens
    images, rows = max(1, budget // (row_bytes * tokens)), tokens
    if row_bytes * tokens > 1.5 * budget:
        pieces = ceil(tokens / max(4 * radius, budget // row_bytes, 1))
        rows = ceil(tokens / pieces)
    for image in range(0, batch, images):
        for row in range(0, tokens, rows):
            end = min(row + rows, tokens)
            reach = slice(max(row - radius, 0), min(end + radius, tokens))
            missing = (reach.start - (row - radius), end + radius - reach.stop)
            yield Tile(slice(image, min(image + images, batch)), slice(row, end), reach, missing)


def _reaching(x_bCRN: Tensor, kernel: Tensor, tile: Tile) -> tuple[Tensor, tuple[int, int]]:
    """The tile, and the zeros around it that stand for what is not there, as convolutions take them."""
    above, below = tile.missing
    if above != below:
        x_bCRN, above = F.pad(x_bCRN, (0, 0, above, below)), 0
    return x_bCRN, (above, kernel.shape[-1] // 2)


def convolve(x_bCRN: Tensor, kernel: Tensor, tile: Tile, groups: int = 1, bias_C: Tensor | None = None) -> Tensor:
    """Slide a kernel over the (query, key) plane of a tile that covers its reach; zero outside the map.

    Args:
        x_bCRN: [b, C, R + reach, N], in either memory format.
        kernel: [maps out, C / groups, k, k].
    Returns:
        The rows the tile makes, [b, maps out, R, N], in the same memory format.
    """
    x_bCRN, padding = _reaching(x_bCRN, kernel, tile)
    return F.conv2d(x_bCRN, kernel, bias_C, padding=padding, groups=groups)


def kernel_gradient(x_bCRN: Tensor, grad_bCRN: Tensor, kernel: Tensor, tile: Tile, groups: int = 1) -> Tensor:
    """What one tile adds to the gradient of the kernel of :func:`convolve`, in the kernel's shape.

    Args:
        x_bCRN: what was convolved, with its reach.
        grad_bCRN: the gradient of the rows made.
    """
    x_bCRN, padding = _reaching(x_bCRN, kernel, tile)
    return conv2d_weight(x_bCRN, kernel.shape, grad_bCRN, padding=padding, groups=groups)
