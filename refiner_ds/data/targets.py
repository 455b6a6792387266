"""Class and patch targets of a batch, on the device: from labels, or from score maps, mixed as the images are.

Axes: B batch, C classes, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.data.batch import MapBatch
from refiner_ds.data.dense_targets import dense_targets
from refiner_ds.data.mixing import Mix, mix_class_and_patch


def smooth_labels(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels smoothed as timm does: ε/C everywhere and 1 − ε + ε/C at the label. [B] → [B, C] fp32."""
    target_BC = torch.full((len(labels_B), classes), smoothing / classes, device=labels_B.device)
    return target_BC.scatter_(1, labels_B[:, None], 1 - smoothing + smoothing / classes)


def label_targets(
    labels_B: Tensor, classes: int, smoothing: float, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Targets of a batch without score maps: every patch has its image's label.

    Returns:
        class target [B, C] and patch targets [B, P, C], both mixed as the images are.
    """
    target_BC = smooth_labels(labels_B, classes, smoothing)
    return mix_class_and_patch(target_BC, target_BC[:, None].expand(-1, grid[0] * grid[1], -1), mix, side, grid)


def map_targets(
    maps: MapBatch, classes: int, smoothing: float, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Targets of a batch with score maps; arguments and results as in `label_targets`."""
    return mix_class_and_patch(*dense_targets(maps, classes, grid, smoothing), mix, side, grid)
