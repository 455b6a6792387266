"""From a batch as it was loaded to what the model and the loss take; everything random here follows from (seed, step).

uint8 pixels, labels or score maps ─▶ normalize ─▶ mixup or CutMix ─▶ images, targets, the box mix-token swaps
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.config.schema import RefinerKeys
from refiner_ds.data.batch import Batch
from refiner_ds.data.mixing import Mix, draw_mix, mix_images, mix_targets
from refiner_ds.data.normalize import normalize
from refiner_ds.data.targets import label_targets, map_targets
from refiner_ds.models.mix_token import NO_BOX, Box, draw_mix_box

# The model has a short cut for NO_BOX, which a compiled model would have to be compiled anew for.
ANOTHER_EMPTY_BOX: Box = (1, 1, 1, 1)


class Inputs(NamedTuple):
    """One micro-batch, ready: images, mix-token's box, class target and patch targets (before the box)."""

    images_B3HW: Tensor
    box: Box
    target_BC: Tensor
    target_BPC: Tensor


class InputMaker:
    """Makes inputs of one run.

    Args:
        grid: rows and columns of patches.
        dtype: of the images, the engine's.
    """

    def __init__(self, keys: RefinerKeys, num_classes: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
        self._keys = keys
        self._classes = num_classes
        self._grid = grid
        self._dtype = dtype

    def __call__(self, batch: Batch, seed: int, epoch: float = 0.0) -> Inputs:
        """Prepare ``batch``, which is on the device already.

        Args:
            seed: decides all mixing.
            epoch: epochs trained before this step; mixup and CutMix may end before the run does.
        """
        data, recipe, side = self._keys.data, self._keys.recipe, self._keys.model.img_size
        generator = torch.Generator().manual_seed(seed)
        mix = draw_mix(recipe, side, generator)
        if recipe.mixup_off_epoch and epoch >= recipe.mixup_off_epoch:
            mix = Mix()
        images_B3HW = mix_images(normalize(batch.images_BHWC, data.mean, data.std, self._dtype), mix)
        how = (self._classes, recipe.label_smoothing, mix, side, self._grid)
        targets = label_targets(batch.labels_B, *how) if batch.maps is None else map_targets(batch.maps, *how)
        target_BC, target_BPC = targets
        box = draw_mix_box(self._grid, generator) if recipe.mix_token else NO_BOX
        if recipe.mix_token and box == NO_BOX and self._keys.model.compile != "none":
            box = ANOTHER_EMPTY_BOX
        y0, x0, y1, x1 = box
        kept = 1 - (y1 - y0) * (x1 - x0) / (self._grid[0] * self._grid[1])
        return Inputs(images_B3HW, box, mix_targets(target_BC, kept), target_BPC)
