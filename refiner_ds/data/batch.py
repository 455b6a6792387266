"""What travels from the loader to the device: uint8 pixels, labels, and score maps as top-k with the way back to them.

    worker ── Parcel: one tensor, one file descriptor ──▸ training process ── pinned ──▸ Batch on the device

Axes: B batch, H and W pixels, K top-k, h×w a score map's grid, S steps from a view back to its image, n bytes.
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
        steps_BS23: [B, S, 2, 3] float32 matrices, applied in order to a point of the view, the last one leading into
            the image; all coordinates are fractions of the picture. A point that leaves [0, 1] on the way lies where
            nothing of the image is.
    """

    values_BKhw: Tensor
    classes_BKhw: Tensor
    steps_BS23: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> MapBatch:
        """The same maps with ``change`` applied to every tensor."""
        return MapBatch(change(self.values_BKhw), change(self.classes_BKhw), change(self.steps_BS23))


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images_BHWC: [B, S, S, 3] uint8 pixels, contiguous.
        labels_B: [B] int64.
        sample_B: [B] int64, number of each sample in the set.
        valid_B: [B] bool. False where evaluation pads, and where a damaged sample was skipped: such a place holds a
            copy of another sample of the batch, label and map included, so that training can go on without a special
            case.
        padded: samples at the end of an epoch's last batch that are repeated from its beginning (training), or
            places that hold nothing (evaluation).
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

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with ``change`` applied to every tensor."""
        return replace(
            self,
            images_BHWC=change(self.images_BHWC),
            labels_B=change(self.labels_B),
            sample_B=change(self.sample_B),
            valid_B=change(self.valid_B),
            maps=self.maps.each(change) if self.maps else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the loader asks for it where there is a GPU."""
        return self.each(lambda tensor: tensor.pin_memory())


ALIGNMENT = 64  # bytes between the beginnings of packed tensors: any dtype may be viewed there


@dataclass(frozen=True)
class Parcel:
    """A batch packed for the way from a worker: every tensor handed over costs half a millisecond, whatever its size.

    Attributes:
        frame: the batch with its tensors left out.
        forms: dtype and shape of each of them, in the order of `Batch.each`.
        packed_n: [n] uint8, their bytes.
    """

    frame: Batch
    forms: list[tuple[torch.dtype, torch.Size]]
    packed_n: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Parcel:
        """Pack a batch on the CPU."""
        tensors: list[Tensor] = []

        def leave_out(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.new_empty(0)

        frame = batch.each(leave_out)
        forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
        packed_n = torch.empty(sum(_room(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
        start = 0
        for tensor in tensors:
            packed_n[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
            start += _room(tensor.nbytes)
        return cls(frame, forms, packed_n)

    def opened(self) -> Batch:
        """The batch, its tensors being views of the parcel's memory."""
        forms, start = iter(self.forms), 0

        def put_back(_: Tensor) -> Tensor:
            nonlocal start
            dtype, shape = next(forms)
            size = shape.numel() * dtype.itemsize
            tensor = self.packed_n[start : start + size].view(dtype).view(shape)
            start += _room(size)
            return tensor

        return self.frame.each(put_back)

    def pin_memory(self) -> Parcel:
        """The same parcel in page-locked memory; the loader asks for it where there is a GPU."""
        return replace(self, packed_n=self.packed_n.pin_memory())


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
