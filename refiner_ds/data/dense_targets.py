"""Targets of class and patches out of score maps, on the device.

Each patch's logits are the mean of the map over the patch, bilinear between cell centres, at the points of the image
that the patch's pixels came from: RoIAlign (He et al., 2017) with half-pixel alignment, extended from boxes to any
chain of affine transforms so that rotated, sheared and translated views get their own labels. With crops alone it
equals ``torchvision.ops.roi_align(aligned=True)``. Where a view shows no image, and for classes outside a location's
top k, logits are 0.

Axes: B batch, K top-k, h×w a map's grid, M = h·w, C classes, P patches, Q sampling points a patch, T affine transforms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.data.batch import MapBatch

POINTS_PER_SIDE = 2  # a patch of a whole-image view is 18/14 cells wide: RoIAlign's adaptive choice is 2 as well


def sampling_points(grid: tuple[int, int], points: int, device: torch.device) -> Tensor:
    """Points spread evenly over every patch of a view, [P, Q, 2] (x, y) as fractions of the view."""
    rows, columns = grid
    y = (torch.arange(rows * points, device=device) + 0.5) / (rows * points)
    x = (torch.arange(columns * points, device=device) + 0.5) / (columns * points)
    y_rows, x_rows = torch.meshgrid(y, x, indexing="ij")
    points_yx2 = torch.stack([x_rows, y_rows], -1).reshape(rows, points, columns, points, 2)
    return points_yx2.transpose(1, 2).reshape(rows * columns, points * points, 2)


def to_image(points_PQ2: Tensor, affine_BT23: Tensor) -> tuple[Tensor, Tensor]:
    """Where points of a view lie in the image.

    Returns:
        [B, P, Q, 2] points (x, y) as fractions of the image, and [B, P, Q] whether they lie in the image.
    """
    xy_BPQ2 = points_PQ2.expand(len(affine_BT23), -1, -1, -1)
    inside_BPQ = torch.ones(xy_BPQ2.shape[:-1], dtype=torch.bool, device=points_PQ2.device)
    for matrix_B23 in affine_BT23.unbind(1):
        xy_BPQ2 = torch.einsum("bij,bpqj->bpqi", matrix_B23[:, :, :2], xy_BPQ2) + matrix_B23[:, None, None, :, 2]
        slack = 1e-6  # a view's own edge may come back a rounding error outside
        inside_BPQ = inside_BPQ & ((xy_BPQ2 >= -slack) & (xy_BPQ2 <= 1 + slack)).all(-1)
    return xy_BPQ2, inside_BPQ


def cell_weights(xy_BPQ2: Tensor, inside_BPQ: Tensor, rows: int, columns: int) -> Tensor:
    """Share of every map cell in every patch, [B, P, M]: bilinear in each point, the mean over a patch's points."""

    def bilinear(fraction_BPQ: Tensor, cells: int) -> Tensor:
        centre_BPQ = (fraction_BPQ * cells - 0.5).clamp(0, cells - 1)
        return (1 - (centre_BPQ[..., None] - torch.arange(cells, device=centre_BPQ.device)).abs()).clamp(min=0)

    across_BPQw = bilinear(xy_BPQ2[..., 0], columns)
    down_BPQh = bilinear(xy_BPQ2[..., 1], rows) * inside_BPQ[..., None]
    weights_BPhw = torch.einsum("bpqh,bpqw->bphw", down_BPQh, across_BPQw) / xy_BPQ2.shape[2]
    return weights_BPhw.flatten(2)


@torch.no_grad()
def dense_targets(
    maps: MapBatch, classes: int, grid: tuple[int, int], smoothing: float = 0.0, points: int = POINTS_PER_SIDE
) -> tuple[Tensor, Tensor]:
    """Soft targets of a batch's views.

    Args:
        maps: score maps with the views' transforms, on the device to compute on.
        classes: number of classes C.
        grid: the model's patch grid (rows, columns).
        smoothing: ε of y·(1 − ε + ε/C) + ε/C, the released recipe's form; its rows sum to 1 + ε/C.
        points: sampling points a side of a patch.
    Returns:
        class target [B, C], of the mean logits over the view, and patch targets [B, P, C]; fp32.
    """
    batch, _, rows, columns = maps.values_BKhw.shape
    with torch.autocast(maps.values_BKhw.device.type, enabled=False):
        logits_BCM = torch.zeros(batch, classes, rows * columns, device=maps.values_BKhw.device)
        logits_BCM.scatter_(1, maps.classes_BKhw.flatten(2).long(), maps.values_BKhw.flatten(2).float())
        points_PQ2 = sampling_points(grid, points, maps.affine_BT23.device)
        weights_BPM = cell_weights(*to_image(points_PQ2, maps.affine_BT23), rows, columns)
        logits_BPC = weights_BPM @ logits_BCM.transpose(1, 2)
        return smooth(logits_BPC.mean(1).softmax(-1), smoothing), smooth(logits_BPC.softmax(-1), smoothing)


def smooth(target: Tensor, smoothing: float) -> Tensor:
    """y·(1 − ε + ε/C) + ε/C over the last axis."""
    share = smoothing / target.shape[-1]
    return target * (1 - smoothing + share) + share if smoothing else target
