"""Being asked to stop: USR2 (Slurm through submitit), TERM, Ctrl-C and a terminal that goes away.

    before the first step     nothing is lost: the process leaves at once with exit code 75
    later                     a flag is raised; the loop finishes the step, saves together with the other ranks, leaves
    Ctrl-C again              leaves at once, unsaved
    TERM or HUP again         leaves after a grace time, saved or not

Nothing is saved inside a handler: a sharded checkpoint needs every rank, and ranks are signalled at different moments.
Python runs handlers only between two lines of Python, and a rank that waits for others inside a collective may never
come to the next one. A thread that is woken by the signal itself therefore decides what has to happen at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from refiner_ds.exit_codes import RUN_AGAIN

STOPPING = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_SECONDS = 1.0  # launchers pass on what a terminal has sent to the whole group already
GRACE_SECONDS = 20.0  # from the second TERM on; Slurm kills 30 s after its first

END = b"\0"  # no signal has this number

_before_leaving: list[Callable[[int], object]] = []


@contextmanager
def before_leaving(callback: Callable[[int], object]) -> Iterator[None]:
    """Have `leave_at_once` call ``callback(exit code)`` before it ends this process, while the block runs."""
    _before_leaving.append(callback)
    try:
        yield
    finally:
        _before_leaving.remove(callback)


def leave_at_once(code: int) -> None:
    """End this process now, from any thread, whatever its main thread is waiting for.

    A callback of `before_leaving` that raises SystemExit changes the exit code.
    """
    for callback in reversed(_before_leaving):
        try:
            callback(code)
        except SystemExit as decided:
            code = decided.code if isinstance(decided.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class StopFlag:
    """True once this process has been asked to stop.

    Attributes:
        reason: what asked first: a signal's name, or a sentence; None as long as nobody has.
        signal: the first signal, if it was one.
    """

    def __init__(
        self,
        leave: Callable[[int], None] = leave_at_once,
        grace_seconds: float = GRACE_SECONDS,
        same_request_seconds: float = SAME_REQUEST_SECONDS,
    ) -> None:
        self.reason: str | None = None
        self.signal: signal.Signals | None = None
        self._leave = leave
        self._grace = grace_seconds
        self._same_request = same_request_seconds
        self._saves = False
        self._first: float | None = None
        self._last_chance = False
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.reason is not None

    def something_to_save(self) -> None:
        """From now on a request waits for the end of the step; before, it acts at once."""
        with self._lock:
            asked_before = self.reason if not self._saves else None
            self._saves = True
        if asked_before:
            self._leave(RUN_AGAIN)

    def raise_flag(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self._note(signal.Signals(number))

    def ask(self, reason: str) -> None:
        """Ask to stop for another reason than a signal: the launcher is gone, the run folder was taken over."""
        with self._lock:
            self.reason = self.reason or reason
            at_once = not self._saves
        if at_once:
            self._say(reason)
            self._leave(RUN_AGAIN)

    def on_signal(self, number: int, now: float | None = None) -> None:
        """Act on a signal, in the thread that no collective can hold up.

        Args:
            now: seconds of a monotonic clock.
        """
        asked = signal.Signals(number)
        now = time.monotonic() if now is None else now
        self._note(asked)
        if not self._saves:
            self._leave(RUN_AGAIN)
        elif self._first is None:
            self._first = now
            if asked == signal.SIGINT:
                self._say("stopping: the step is finished and saved first; Ctrl-C again leaves at once, unsaved")
        elif now - self._first < self._same_request:
            pass
        elif asked == signal.SIGINT:
            self._leave(128 + asked)
        elif asked != signal.SIGUSR2 and not self._last_chance:
            self._last_chance = True
            timer = threading.Timer(self._grace, self._leave, (128 + asked,))
            timer.daemon = True
            timer.start()

    def _note(self, asked: signal.Signals) -> None:
        if self.reason is None:
            self.signal, self.reason = asked, asked.name

    @staticmethod
    def _say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                print(f"\n{text}", file=sys.stderr, flush=True)


@contextmanager
def stop_flag(flag: StopFlag | None = None) -> Iterator[StopFlag]:
    """A flag that the signals of `STOPPING` raise while the block runs; the handlers from before come back after it.

    Ctrl-C and HUP that this process was started to ignore (``nohup``, ``&`` in a script) stay ignored.
    """
    flag = flag or StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return
    ignored = {number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN}
    numbers = [number for number in STOPPING if number not in ignored]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listener = threading.Thread(target=_listen, args=(reading, flag), name="signals", daemon=True)
    listener.start()
    before = {number: signal.signal(number, flag.raise_flag) for number in numbers}
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, END)  # closing would not do: loader workers hold the other end, too
        listener.join()
        os.close(writing)
        os.close(reading)


def _listen(reading: int, flag: StopFlag) -> None:
    while END not in (numbers := os.read(reading, 64)):
        for number in numbers:
            if number in STOPPING:
                flag.on_signal(number)
