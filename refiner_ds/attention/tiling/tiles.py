"""Tiles of query rows: the pieces in which the tiled backend makes and forgets expanded maps.

    a map [B, H, N, N] ── tiles ──> some images whole, or some rows of one image, small enough for a cache
                                    └─ with a halo: the rows around them that a convolution reads

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

__all__ = ["Tile", "convolution_gradients", "convolve", "tiles"]

# Bytes of one expanded tile. On CPU a few of them should stay in the second-level cache and its neighbour; on
# GPU they should be large enough for the kernels to fill the card.
CPU_TILE_BYTES = 2**21
GPU_TILE_BYTES = 2**29


class Tile(NamedTuple):
    """Where a piece of work lies.

    Args:
        images: which images.
        rows: the query rows that are computed.
        with_halo: those rows and the ones around them that a convolution reads, inside the map.
        missing: how many rows of the halo lie outside the map, above and below.
    """

    images: slice
    rows: slice
    with_halo: slice
    missing: tuple[int, int]

    @property
    def interior(self) -> slice:
        """The computed rows within ``with_halo``."""
        first = self.rows.start - self.with_halo.start
        return slice(first, first + self.rows.stop - self.rows.start)


def tiles(
    batch: int, tokens: int, maps: int, device: torch.device, radius: int = 0, entry_bytes: int = 4
) -> Iterator[Tile]:
    """Cut ``maps`` maps of ``batch`` images into tiles, with a halo of ``radius`` rows on either side."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    row_bytes = entry_bytes * maps * tokens
    images, rows = max(1, budget // (row_bytes * tokens)), tokens
    if row_bytes * tokens > 1.5 * budget:
        pieces = ceil(tokens / max(4 * radius, budget // row_bytes, 1))
        rows = ceil(tokens / pieces)
    for image in range(0, batch, images):
        for row in range(0, tokens, rows):
            end = min(row + rows, tokens)
            with_halo = slice(max(row - radius, 0), min(end + radius, tokens))
            missing = (with_halo.start - (row - radius), end + radius - with_halo.stop)
            yield Tile(slice(image, min(image + images, batch)), slice(row, end), with_halo, missing)


def _padding(kernel: Tensor, tile: Tile) -> tuple[int, int]:
    """Zeros above and to the left: where rows are missing on one side both are padded, and the surplus is cut off."""
    radius = kernel.shape[-1] // 2
    return (radius if any(tile.missing) else 0), radius


def convolve(x_bCRN: Tensor, kernel: Tensor, tile: Tile, groups: int = 1, bias_C: Tensor | None = None) -> Tensor:
    """Convolve a tile over the (query, key) plane, zero outside the map.

    Args:
        x_bCRN: [b, C, R + halo, N], in either memory format.
        kernel: [maps out, C / groups, k, k].
    Returns:
        The rows of the tile, [b, maps out, R, N], in the same memory format.
    """
    padding = _padding(kernel, tile)
    out_bCRN = F.conv2d(x_bCRN, kernel, bias_C, padding=padding, groups=groups)
    return out_bCRN[:, :, tile.interior] if padding[0] else out_bCRN


def convolution_gradients(
    x_bCRN: Tensor, grad_bCRN: Tensor, kernel: Tensor, tile: Tile, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Backward of :func:`convolve`: the gradient of the tile's rows, and its share of the kernel's gradient.

    Args:
        x_bCRN: the convolution's input, with the halo.
        grad_bCRN: the gradient of its output, with the halo too; overwritten.
    Returns:
        [b, C, R, N] and the kernel's shape.
    """
    # With maps last in memory it takes a half to a tenth of the time on CPU, copies included.
    x_bCRN, grad_bCRN = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x_bCRN, grad_bCRN))
    padding = _padding(kernel, tile)

    def gradients(out_bCRN: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            out_bCRN, x_bCRN, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], groups, wanted
        )

    if tile.with_halo == tile.rows:
        d_x_bCRN, d_kernel, _ = gradients(grad_bCRN, [True, True, False])
        return d_x_bCRN, d_kernel
    flipped = kernel.flip(-1, -2)
    flipped = flipped if groups > 1 else flipped.transpose(0, 1)
    d_x_bCRN = convolve(grad_bCRN, flipped, tile, groups)
    interior_bCRN = grad_bCRN[:, :, tile.interior]
    if padding[0]:
        grad_bCRN[:, :, : tile.interior.start] = 0
        grad_bCRN[:, :, tile.interior.stop :] = 0
        interior_bCRN = grad_bCRN
    return d_x_bCRN, gradients(interior_bCRN, [False, True, False])[1]
