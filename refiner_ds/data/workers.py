"""What became of a loader worker that died: which one, of what, and how much memory it had.

The kernel kills workers that take too much memory, and torch then raises a RuntimeError wherever the training process
happens to be. `explain_worker_death` turns that into one sentence; for it, `WorkerWatch` looks at a worker's memory now
and then, since nothing can be asked of a process that is gone.
"""

from __future__ import annotations

import os
import re
import signal
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from refiner_ds.errors import WorkerError

TORCH_SAYS = "DataLoader worker"
PROCESS_NUMBERS = re.compile(r"\d+(?=[,)\s])")  # in torch's sentence
CGROUP_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))

_watches: weakref.WeakSet[WorkerWatch] = weakref.WeakSet()


class WorkerWatch:
    """The workers of one loader, and the memory each was last seen with.

    Args:
        workers: their processes, in the order of their numbers.
    """

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self.workers = list(workers)
        self._memory = dict.fromkeys(range(len(self.workers)), 0)
        self._next = 0
        self._killed_for_memory = _killed_for_memory()
        for number in self._memory:
            self._look(number)
        _watches.add(self)

    def look(self) -> None:
        """Look at the memory of one worker, each in turn: a few microseconds."""
        if self.workers:
            self._look(self._next)
            self._next = (self._next + 1) % len(self.workers)

    def _look(self, number: int) -> None:
        try:
            pages = int(Path(f"/proc/{self.workers[number].pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return  # gone: what it had before is what there is to tell
        if pages:  # none: dead, though not yet waited for
            self._memory[number] = pages * os.sysconf("SC_PAGE_SIZE")

    def death(self) -> str | None:
        """What became of the first worker that died of itself; None while all live."""
        for number, worker in enumerate(self.workers):
            worker.join(timeout=0.0)
            code = worker.exitcode
            if code in (None, 0):
                continue
            memory = self._memory[number] / 2**20
            return (
                f"DataLoader worker {number} of {len(self.workers)} (process {worker.pid}) {how_it_ended(code or 0)}; "
                f"it was last seen with {memory:,.0f} MiB of memory, all {len(self.workers)} with "
                f"{sum(self._memory.values()) / 2**20:,.0f} MiB{self._advice(code or 0)}"
            )
        return None

    def _advice(self, code: int) -> str:
        if _killed_for_memory() > self._killed_for_memory:
            return "; the kernel killed it, out of memory: use fewer refiner.data.workers, or ask for more memory"
        if code == -signal.SIGKILL:
            return "; if nobody killed it, memory ran out: use fewer refiner.data.workers, or ask for more memory"
        if code == -signal.SIGBUS:
            return "; shared memory ran out: enlarge /dev/shm, or use fewer refiner.data.workers"
        return ""


def how_it_ended(code: int) -> str:
    """What an exit code of a process, negative for a signal, says in words."""
    if code < 0:
        return f"was killed by signal: {signal.strsignal(-code)} ({signal.Signals(-code).name})"
    return f"exited with code {code}"


def _killed_for_memory() -> int:
    """How many processes of this container the kernel has killed for want of memory."""
    for file in CGROUP_EVENTS:
        try:
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


@contextmanager
def explain_worker_death() -> Iterator[None]:
    """Say in one sentence which loader worker died, and how, wherever torch notices it.

    Raises:
        WorkerError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if TORCH_SAYS not in str(error):
            raise
        named = {int(number) for number in PROCESS_NUMBERS.findall(str(error))}
        found = [watch.death() for watch in list(_watches) if named & {worker.pid for worker in watch.workers}]
        raise WorkerError(next(filter(None, found), None) or str(error).splitlines()[0]) from None
