"""How long one step takes: CPU time, elapsed time, or time between two events of a GPU; and a limit to how long."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["OutOfTime", "clock_of", "limited", "seconds_of"]


class OutOfTime(BaseException):
    """Raised inside :func:`limited`; no ``Exception``, which compilers catch on their way."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside, OutOfTime is raised when so many seconds are over: as soon as Python runs again, so not within a call of
    C++. Outside a process's main thread, which alone is interrupted, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    begin, over = time.monotonic(), False

    def interrupt(*_: object) -> None:
        if not over:
            raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    others, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        if others:  # somebody else's limit goes on
            signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - begin), 1e-3))


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
