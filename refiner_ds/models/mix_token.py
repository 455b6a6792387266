"""Mix-token: a box of patches exchanged with the batch in reverse order, and flipped back in the patch logits.

    [B,D,h,w] of the stem ── swap inside the box with the flipped batch ── … ── [B,P,C] patch logits ── swap back

A box is (y0, x0, y1, x1) in patch cells, half open; (0, 0, 0, 0) mixes nothing. Axes: B batch, P patches, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Box", "NO_BOX", "draw_mix_box", "swap_in_box"]

# Numbers, or scalar tensors: then a compiled step knows nothing of what they are.
Box = tuple[int, int, int, int]
NO_BOX: Box = (0, 0, 0, 0)


def draw_mix_box(grid: tuple[int, int], generator: torch.Generator | None = None) -> Box:
    """Draw a box of the grid of area 1 − λ, λ ~ Beta(1, 1), around a uniform centre and clipped (CutMix's rule).

    Args:
        grid: rows and columns of patches.
        generator: a CPU generator; ``None`` takes torch's global one.
    """
    keep, row, column = torch.rand(3, generator=generator, device="cpu").tolist()
    side = math.sqrt(1.0 - keep)
    starts, stops = [], []
    for cells, centre in zip(grid, (row, column), strict=True):
        half, middle = int(cells * side) // 2, int(cells * centre)
        starts.append(max(middle - half, 0))
        stops.append(min(middle + half, cells))
    return starts[0], starts[1], stops[0], stops[1]


def swap_in_box(x_Bhw: Tensor, box: Box, grid_axis: int) -> Tensor:
    """Replace what lies inside the box with the same place of the batch in reverse order; its own inverse.

    Args:
        x_Bhw: a tensor whose axes ``grid_axis`` and ``grid_axis + 1`` are the patch grid, and whose first is the batch.
        box: the box; with :data:`NO_BOX` the tensor comes back as it is.
        grid_axis: 1 for [B, h, w, C], 2 for [B, D, h, w].
    """
    if not isinstance(box[0], Tensor) and box == NO_BOX:
        return x_Bhw
    y0, x0, y1, x1 = box
    rows, columns = x_Bhw.shape[grid_axis : grid_axis + 2]
    y = torch.arange(rows, device=x_Bhw.device)[:, None]
    x = torch.arange(columns, device=x_Bhw.device)[None, :]
    # A mask and not slices: boxes change every step, and a compiled step must not be compiled for each.
    inside_hw = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    inside = inside_hw.reshape(rows, columns, *[1] * (x_Bhw.dim() - grid_axis - 2))
    return torch.where(inside, x_Bhw.flip(0), x_Bhw)
