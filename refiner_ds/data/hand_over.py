"""How a batch gets to the device without anyone waiting: through host memory that is used in turn, a batch ahead.

    loader ──▸ one of two slots ──copy stream──▸ device       while the device computes with the batch before
                page-locked

On a CPU the batch stays in its slot, and nothing is ahead. All that is allocated a batch is the device's copy, which
its caching allocator gives out again once the last operation that reads it is done.

Axes: n bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.data.batch import Batch
from refiner_ds.data.shared_memory import PackedBatch

__all__ = ["SLOTS", "HandOver", "UnderWay"]

SLOTS = 2  # one that is copied to the device while the other is filled


class UnderWay(NamedTuple):
    """A batch on its way: its bytes on the device, and what tells that they are there; None where they are."""

    packed: PackedBatch
    bytes_n: Tensor
    copied: torch.cuda.Event | None


class HandOver:
    """Brings packed batches to a device, one after the other.

    On a CPU a batch may be used until `SLOTS` more have been asked for: it lies in a slot.

    Attributes:
        ahead: batches that are to be under way before the first of them is used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = [torch.empty(0, dtype=torch.uint8)] * SLOTS
        self._copied: list[torch.cuda.Event | None] = [None] * SLOTS
        self._turn = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = 0 if self._copies is None else 1

    def room(self, size: int) -> Tensor:
        """Host memory for the next batch, [n] uint8 with n = ``size``; waits until what was in it has been copied."""
        self._turn = (self._turn + 1) % SLOTS
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()  # begun so many batches ago that it is done
        if len(self._slots[self._turn]) < size:
            self._slots[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._copies is not None)
        return self._slots[self._turn][:size]

    def begin(self, packed: PackedBatch, bytes_n: Tensor) -> UnderWay:
        """Begin to copy a batch whose bytes are what was last put into `room`."""
        if self._copies is None:
            return UnderWay(packed, bytes_n, None)
        with torch.cuda.stream(self._copies):
            there_n = bytes_n.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copies)
        self._copied[self._turn] = copied
        return UnderWay(packed, there_n, copied)

    def finish(self, under_way: UnderWay) -> Batch:
        """The batch on the device: what the current stream computes from now on sees it whole."""
        packed, bytes_n, copied = under_way
        if copied is not None:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(copied)
            bytes_n.record_stream(compute)  # or the next batch could be given its memory before it has been read
        return packed.unpack(bytes_n)
