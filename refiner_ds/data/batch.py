"""What travels from the loader to the device: uint8 pixels, labels, and top-k score maps with each view's transforms.

Axes: B batch, H and W pixels, K top-k, h×w a score map's grid, T affine transforms from a view back to its image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MapBatch:
    """Score maps of a batch and where its views came from.

    Attributes:
        values_BKhw: [B, K, h, w] float16 logits.
        classes_BKhw: [B, K, h, w] int16 class numbers.
        affine_BT23: [B, T, 2, 3] float32 matrices, applied in order to a point of the view; the last one gives the
            point of the image. All coordinates are fractions of the picture. A point that leaves [0, 1] on the way
            lies outside the image.
    """

    values_BKhw: Tensor
    classes_BKhw: Tensor
    affine_BT23: Tensor

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> MapBatch:
        """The same maps with ``change`` applied to every tensor."""
        return MapBatch(change(self.values_BKhw), change(self.classes_BKhw), change(self.affine_BT23))


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images_BHWC: [B, S, S, 3] uint8 pixels, contiguous.
        labels_B: [B] int64.
        sample_B: [B] int64, number of each sample in the set.
        valid_B: [B] bool. False where evaluation pads, and where a damaged sample was skipped: such a place holds a
            copy of another sample of the batch, label and map included, so that training needs no special case.
        padded: samples at the end of an epoch's last batch that repeat its beginning (training), or places without a
            sample (evaluation).
        bad: damaged samples that were skipped.
        maps: score maps, where the run asked for them.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    sample_B: Tensor
    valid_B: Tensor
    padded: int = 0
    bad: int = 0
    maps: MapBatch | None = None

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with ``change`` applied to every tensor."""
        return replace(
            self,
            images_BHWC=change(self.images_BHWC),
            labels_B=change(self.labels_B),
            sample_B=change(self.sample_B),
            valid_B=change(self.valid_B),
            maps=self.maps.map_tensors(change) if self.maps else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
