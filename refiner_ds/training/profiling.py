"""Traces of chosen steps by torch.profiler, and where their time went, in words.

    refiner.run.profile_steps [100, 102]     these steps
    echo 5 > <run folder>/profile            five steps of a live run, from any machine that sees the folder
    kill -USR1 PID                           three steps; PID is any rank's

    profiles/step_00000100/rank_00000.json.gz …     for Perfetto or chrome://tracing
    profiles/step_00000100/summary.txt              a line a rank

USR1, since the stop signals, QUIT (stacks) and USR2 (Slurm's, through submitit) have their meaning already.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import Console, log
from refiner_ds.training.trace_summary import in_words, read_trace, shares
from refiner_ds.training.world import World

MOST_RANKS = 8  # that write traces
DEFAULT_STEPS, MOST_STEPS = 3, 50  # of a request; traces take tens of megabytes a step
POLL_SECONDS = 1.0


class Profiling:
    """Decides which steps are profiled, and profiles them. Every rank calls it for the same steps.

    Args:
        steps: first and last step, counted from 1, that the run file names; None: none.
    """

    def __init__(self, folder: RunFolder, world: World, console: Console, steps: tuple[int, int] | None) -> None:
        self._folder, self._world, self._console = folder, world, console
        self._windows = [steps] if steps is not None else []
        self._last = 0
        self._signalled = False
        self._asked_steps = DEFAULT_STEPS
        self._polled = 0.0
        self._profiler: Any = None
        self._began_at: int | None = None
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Whether this process was asked for a profile since the last call; each request counts once."""
        asked, self._signalled = self._signalled, False
        return self._found_file() or asked

    def _found_file(self) -> bool:
        """Take the request file away, if there is one; the main process looks, now and then."""
        now = time.monotonic()
        if not self._world.is_main or now - self._polled < POLL_SECONDS:
            return False
        self._polled = now
        try:
            text = self._folder.profile_request.read_text().strip()
            self._folder.profile_request.unlink()
        except OSError:
            return False
        self._asked_steps = DEFAULT_STEPS
        with suppress(ValueError):
            self._asked_steps = min(max(int(text), 1), MOST_STEPS)
        return True

    def plan(self, step: int) -> None:
        """Profile the steps after ``step``, as many as were asked for. Every rank must call it."""
        count = self._world.broadcast(self._asked_steps)
        self._asked_steps = DEFAULT_STEPS
        self._windows.append((step + 1, step + count))

    def before(self, step: int) -> None:
        """Begin, if ``step``, counted from 1, is the first of a window."""
        window = next((window for window in self._windows if window[0] <= step <= window[1]), None)
        if window is None or self._began_at is not None:
            return
        self._began_at, self._last = step, window[1]
        if self._world.rank < MOST_RANKS:
            cuda = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()

    def is_last(self, step: int) -> bool:
        """Whether ``step`` ends what is being profiled."""
        return self._began_at is not None and step >= self._last

    def finish(self, step: int) -> None:
        """Write the trace and say where the time of the steps went. Every rank must call it, after ``step``."""
        assert self._began_at is not None
        first, line = self._began_at, None
        folder = self._folder.profile(first)
        if self._profiler is not None:
            try:
                line = self._write(folder)
            except OSError as error:
                line = f"no trace: {error}"
        self._began_at = self._profiler = None
        self._windows = [window for window in self._windows if window[1] > step]
        lines = [f"rank {rank}: {said}" for rank, said in enumerate(self._world.gather(line)) if said is not None]
        if self._world.is_main:
            title = f"profile of step {first}" if first == step else f"profile of steps {first} to {step}"
            try:
                write_atomically(folder / "summary.txt", "\n".join([title, *lines]) + "\n")
            except OSError as error:
                log.warning("%s: %s", folder, error)
            self._console.print(f"{title}, {folder}:")
            for said in lines:
                self._console.print(f"  {said}")

    def _write(self, folder: Any) -> str:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._profiler.stop()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank_{self._world.rank:05d}.json.gz"
        self._profiler.export_chrome_trace(str(file))
        return in_words(shares(read_trace(file)))

    def close(self) -> None:
        """End what is being profiled, unwritten, and listen to USR1 no longer."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
            self._before = None
