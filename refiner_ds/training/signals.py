"""Being asked to stop: USR2 (Slurm through submitit) and TERM raise a flag that the loop reads between steps.

Nothing is saved inside a handler: a sharded checkpoint needs every rank, and ranks are signalled at different moments.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGUSR2, signal.SIGTERM)


class StopFlag:
    """True once this process has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def raise_flag(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that USR2 and TERM raise while the block runs; the handlers from before come back after it."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, flag.raise_flag) for number in STOPPING}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
