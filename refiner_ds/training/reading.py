"""Numbers on their way from the device to the host, read when the device has had time to compute them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

__all__ = ["Reader", "Unread", "scalar_on"]


class Unread:
    """Groups of numbers that the device may still be computing."""

    def __init__(self, reader: Reader, numbers_n: Tensor, sizes: list[int], computed: torch.cuda.Event | None) -> None:
        self._reader, self._numbers, self._sizes, self._computed = reader, numbers_n, sizes, computed

    def read(self) -> list[list[float]]:
        """Wait for them, and no longer; may be called once."""
        if self._computed is not None:
            self._computed.synchronize()
        numbers = iter(self._numbers.tolist())
        self._reader.give_back(self._numbers)
        return [list(islice(numbers, size)) for size in self._sizes]


class Reader:
    """Copies numbers to the host, on a GPU into page-locked memory that is used again once they have been read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._free: list[Tensor] = []

    def begin(self, groups: Sequence[Tensor]) -> Unread:
        """Begin to copy numbers, [n] or scalar each; nothing waits.

        Args:
            groups: in any floating dtype.
        """
        sizes = [group.numel() for group in groups]
        there_n = torch.cat([group.detach().reshape(-1).double() for group in groups])
        if not self._on_gpu:
            return Unread(self, there_n, sizes, None)
        here_n = self._free.pop() if self._free else torch.empty(0, dtype=torch.float64)
        if len(here_n) < len(there_n):
            here_n = torch.empty(len(there_n), dtype=torch.float64, pin_memory=True)
        here_n[: len(there_n)].copy_(there_n, non_blocking=True)
        computed = torch.cuda.Event()
        computed.record()
        return Unread(self, here_n, sizes, computed)

    def give_back(self, numbers_n: Tensor) -> None:
        """Let page-locked memory be used again."""
        if self._on_gpu:
            self._free.append(numbers_n)


def scalar_on(device: torch.device, number: Tensor | float) -> Tensor:
    """A number on the device, where DeepSpeed has it as a rule."""
    return number.to(device) if isinstance(number, Tensor) else torch.full((), number, device=device)
