"""How batches come over from worker processes: in slots of shared memory that are used again and again.

    training process              worker
    micro-batch number, slot ───▸ makes the batch, packs all of it into the slot
    copies it, frees the slot ◂── what the slot holds: a frame without tensors, dtypes and shapes

Torch makes a file of shared memory for every tensor that is handed over: a descriptor, a connection to pass it through,
and fresh pages that are zeroed and mapped one by one; for small pictures more than all the rest. Slots are made once.
The training process alone gives them out, with a number, and takes them back once it has copied what was in them, so
nothing hangs on how the loader deals with its workers; where none is free, torch hands the packed batch over.

Axes: n bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refiner_ds.data.batch import Batch
from refiner_ds.errors import DataError

ALIGNMENT = 64  # bytes between the beginnings of packed tensors: any dtype may be viewed there
NO_SLOT = -1


def packed_bytes(batch: Batch) -> int:
    """Room that a batch needs; its tensors may be on the meta device."""
    return sum(_room(tensor.nbytes) for tensor in _tensors(batch))


@dataclass(frozen=True)
class Parcel:
    """A packed batch.

    Attributes:
        frame: the batch with its tensors left out.
        forms: dtype and shape of each of them, in the order of `Batch.each`.
        slot: where the bytes are, or `NO_SLOT`.
        packed_n: [n] uint8, the bytes, where there was no slot.
    """

    frame: Batch
    forms: list[tuple[torch.dtype, torch.Size]]
    slot: int
    packed_n: Tensor | None

    @classmethod
    def of(cls, batch: Batch, slot: int = NO_SLOT, memory_n: Tensor | None = None) -> Parcel:
        """Pack a batch, into ``memory_n``, the memory of ``slot``, if there is room in it."""
        size = packed_bytes(batch)
        fits = memory_n is not None and len(memory_n) >= size
        packed_n = memory_n if memory_n is not None and fits else torch.empty(size, dtype=torch.uint8)
        start = 0
        for tensor in _tensors(batch):
            packed_n[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
            start += _room(tensor.nbytes)
        forms = [(tensor.dtype, tensor.shape) for tensor in _tensors(batch)]
        frame = batch.each(lambda tensor: tensor.new_empty(0))
        return cls(frame, forms, slot, None if fits else packed_n)

    def opened(self, packed_n: Tensor) -> Batch:
        """The batch, its tensors being views of its packed bytes."""
        forms, start = iter(self.forms), 0

        def put_back(_: Tensor) -> Tensor:
            nonlocal start
            dtype, shape = next(forms)
            size = shape.numel() * dtype.itemsize
            tensor = packed_n[start : start + size].view(dtype).view(shape)
            start += _room(size)
            return tensor

        return self.frame.each(put_back)


class Packing(Dataset):
    """What a worker holds: the maker of the batches, and the slots."""

    def __init__(self, maker: Dataset, memory_Sn: list[Tensor]) -> None:
        self.maker = maker
        self.memory_Sn = memory_Sn

    def __getitem__(self, task: tuple[int, int]) -> Parcel | DataError:
        """The batch of a number, packed; or the error that stands in its way."""
        number, slot = task
        batch = self.maker[number]
        if isinstance(batch, DataError):
            return batch
        return Parcel.of(batch, slot, None if slot == NO_SLOT else self.memory_Sn[slot])


class Slots:
    """Shared memory for ``count`` batches of ``size`` bytes, and which of it is free.

    Raises:
        DataError: there is not so much shared memory.
    """

    def __init__(self, count: int, size: int) -> None:
        try:
            self.memory_Sn = [torch.zeros(size, dtype=torch.uint8).share_memory_() for _ in range(count)]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{count} batches of {size / 2**20:.1f} MiB do not fit into shared memory ({reason}); take fewer "
                "workers or smaller batches, or give /dev/shm more room (docker run --shm-size)"
            ) from None
        self._free = deque(range(count))

    def tasks(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Numbers with a slot each, as long as there are some."""
        for number in numbers:
            yield number, self._free.popleft() if self._free else NO_SLOT

    def emptied(self, parcel: Parcel, pinned: bool) -> Batch:
        """Copy a batch out of its slot, into page-locked memory if wanted, and free the slot."""
        filled_n = self.memory_Sn[parcel.slot][: _sum_of(parcel)] if parcel.packed_n is None else parcel.packed_n
        packed_n = torch.empty(len(filled_n), dtype=torch.uint8, pin_memory=pinned).copy_(filled_n)
        if parcel.slot != NO_SLOT:
            self._free.append(parcel.slot)
        return parcel.opened(packed_n)


def _tensors(batch: Batch) -> list[Tensor]:
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    batch.each(note)
    return tensors


def _sum_of(parcel: Parcel) -> int:
    return sum(_room(shape.numel() * dtype.itemsize) for dtype, shape in parcel.forms)


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
