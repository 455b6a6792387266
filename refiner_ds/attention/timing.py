"""How long one step takes: CPU time, elapsed time, or time between two events of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["clock_of", "seconds_of"]


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU time where one thread computes, so that other processes do not count; elapsed time where several do."""
    return time.process_time if device.type != "cuda" and torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(
    step: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of ``step`` by ``clock``; on a GPU those between two events around it."""
    if device.type != "cuda":
        begin = clock()
        step()
        return clock() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000
