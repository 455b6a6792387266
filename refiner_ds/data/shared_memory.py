"""How batches travel from worker processes to the training process: through buffers of shared memory that are reused.

    training process                    worker
    micro-batch number, buffer ───────▸ loads the batch, packs its tensors into the buffer
    copies it, frees the buffer ◂────── a `PackedBatch`: everything but the tensors' bytes

Torch makes a file of shared memory for every tensor that crosses a process: a descriptor, a connection to pass it
through, and fresh pages that are zeroed and mapped one by one; for small images more than all other work. These buffers
are made once. The training process alone assigns them, together with a batch number, and frees them once it has copied
their content, so nothing depends on how the loader schedules its workers; where none is free, torch sends the packed
bytes.

Axes: n bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refiner_ds.data.batch import Batch
from refiner_ds.errors import DataError

ALIGNMENT = 64  # bytes between the beginnings of packed tensors: any dtype may be viewed there
NO_BUFFER = -1


def packed_size(batch: Batch) -> int:
    """Bytes that a packed batch takes; its tensors may be on the meta device."""
    return sum(_aligned(tensor.nbytes) for tensor in _tensors(batch))


@dataclass(frozen=True)
class PackedBatch:
    """A batch with all its tensors in one piece of memory.

    Attributes:
        skeleton: the batch with empty tensors.
        layout: dtype and shape of each tensor, in the order of `Batch.map_tensors`.
        buffer: number of the shared buffer that holds the bytes, or `NO_BUFFER`.
        bytes_n: [n] uint8, the bytes, where they are in no buffer.
    """

    skeleton: Batch
    layout: list[tuple[torch.dtype, torch.Size]]
    buffer: int
    bytes_n: Tensor | None

    @classmethod
    def pack(cls, batch: Batch, buffer: int = NO_BUFFER, memory_n: Tensor | None = None) -> PackedBatch:
        """Pack a batch, into ``memory_n``, the memory of ``buffer``, if it is large enough."""
        size = packed_size(batch)
        fits = memory_n is not None and len(memory_n) >= size
        bytes_n = memory_n if memory_n is not None and fits else _memory(size)
        start = 0
        for tensor in _tensors(batch):
            bytes_n[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
            start += _aligned(tensor.nbytes)
        layout = [(tensor.dtype, tensor.shape) for tensor in _tensors(batch)]
        skeleton = batch.map_tensors(lambda tensor: tensor.new_empty(0))
        return cls(skeleton, layout, buffer, None if fits else bytes_n)

    @property
    def size(self) -> int:
        """Bytes that are packed."""
        return sum(_aligned(shape.numel() * dtype.itemsize) for dtype, shape in self.layout)

    def unpack(self, bytes_n: Tensor) -> Batch:
        """The batch, its tensors being views of ``bytes_n``, its packed bytes."""
        layout, start = iter(self.layout), 0

        def view_of_next(_: Tensor) -> Tensor:
            nonlocal start
            dtype, shape = next(layout)
            size = shape.numel() * dtype.itemsize
            tensor = bytes_n[start : start + size].view(dtype).view(shape)
            start += _aligned(size)
            return tensor

        return self.skeleton.map_tensors(view_of_next)


class PackingDataset(Dataset[Any]):
    """What a worker holds: the dataset of batches, and the shared buffers."""

    def __init__(self, batches: Dataset[Any], memory_Sn: list[Tensor]) -> None:
        self.batches = batches
        self.memory_Sn = memory_Sn

    def __getitem__(self, task: tuple[int, int]) -> PackedBatch | DataError:
        """The batch of a number, packed; or the error that stands in its way."""
        number, buffer = task
        batch = self.batches[number]
        if isinstance(batch, DataError):
            return batch
        return PackedBatch.pack(batch, buffer, None if buffer == NO_BUFFER else self.memory_Sn[buffer])


def _memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


class SharedBuffers:
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
                f"{count} batches of {size / 2**20:.1f} MiB do not fit into shared memory ({reason}); use fewer "
                "workers or smaller batches, or enlarge /dev/shm (docker run --shm-size)"
            ) from None
        self._free = deque(range(count))

    def assign(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Pairs of a batch number and a free buffer, or `NO_BUFFER` while there is none."""
        for number in numbers:
            yield number, self._free.popleft() if self._free else NO_BUFFER

    def take(self, packed: PackedBatch, room: Callable[[int], Tensor] = _memory) -> Tensor:
        """Copy a batch's bytes out of its buffer, and free the buffer.

        Args:
            room: makes memory for so many bytes.
        """
        source_n = self.memory_Sn[packed.buffer][: packed.size] if packed.bytes_n is None else packed.bytes_n
        bytes_n = room(len(source_n)).copy_(source_n)
        if packed.buffer != NO_BUFFER:
            self._free.append(packed.buffer)
        return bytes_n


def _tensors(batch: Batch) -> list[Tensor]:
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    batch.map_tensors(collect)
    return tensors


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
