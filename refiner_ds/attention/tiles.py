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

from refiner_ds.attention.norms import statistics_dtype

__all__ = ["Tile", "convolution_gradients", "convolve", "narrow", "product_dtype", "tiles", "widen"]

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


def convolution_gradients(
    x_bCRN: Tensor, grad_bCRN: Tensor, kernel: Tensor, tile: Tile, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The way back of :func:`convolve`: for the rows the tile makes, and what it adds to the kernel's gradient.

    Args:
        x_bCRN: what was convolved, with its reach.
        grad_bCRN: the gradient behind the convolution, with its reach too.
    Returns:
        [b, C, R, N] and the kernel's shape.
    """
    # With maps last in memory it takes a half to a tenth of the time on CPU, copies included.
    x_bCRN, grad_bCRN = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x_bCRN, grad_bCRN))
    whole = tile.reach == tile.rows
    x_bCRN, padding = _reaching(x_bCRN, kernel, tile)

    def gradients(behind_bCRN: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            behind_bCRN, x_bCRN, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], groups, wanted
        )

    if whole:
        d_x_bCRN, d_kernel, _ = gradients(grad_bCRN, [True, True, False])
        return d_x_bCRN, d_kernel
    flipped = kernel.flip(-1, -2)
    if groups == 1:
        flipped = flipped.transpose(0, 1)
    d_kernel = gradients(grad_bCRN[:, :, tile.inner], [False, True, False])[1]
    return convolve(grad_bCRN, flipped, tile, groups), d_kernel


def widen(x_bHRN: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Maps combined to other maps, E of H, [b, E, R, N] with E last in memory, as depthwise convolution wants it."""
    shape = (len(x_bHRN), *weight_EH.T.shape)
    x_bLH, weight_bHE = x_bHRN.flatten(2).mT, weight_EH.T.expand(shape)
    wide_bLE = torch.bmm(x_bLH, weight_bHE) if bias_E is None else torch.baddbmm(bias_E, x_bLH, weight_bHE)
    return wide_bLE.unflatten(1, x_bHRN.shape[2:]).permute(0, 3, 1, 2)


def narrow(x_bERN: Tensor, weight_HE: Tensor) -> Tensor:
    """The way back from maps that lie last in memory, H of E, [b, H, R, N] with N last."""
    x_bLE = x_bERN.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.bmm(weight_HE.expand(len(x_bLE), -1, -1), x_bLE.mT).unflatten(2, x_bERN.shape[2:])


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of tensors like ``x`` take their factors in: halves where hardware multiplies them, else fp32.

    Sums within a product are fp32 or better either way.
    """
    if x.device.type == "cpu" and not (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return statistics_dtype(x.dtype)
    return x.dtype
