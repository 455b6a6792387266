"""The folder in which a set is built, and the processes that build it.

The folder is locked by one process, can be resumed shard by shard, and is renamed once everything is in it:

<set>.partial/
  inputs.json             what the set is built from; a folder with other inputs is refused
  shard-000000.tar        finished shards …
  shard-000000.tar.json   … and the progress record of each: index line, members, notes
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from refiner_ds.data.index import MapFormat, Shard
from refiner_ds.data.tar_format import MEMBER
from refiner_ds.data.workers import how_it_ended
from refiner_ds.data.writer import FinishedShard, cannot_write, publish, write_index, write_whole
from refiner_ds.errors import DataError

INPUTS_NAME = "inputs.json"

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def interruptible() -> Iterator[None]:
    """Report Ctrl-C as an error message instead of a traceback.

    Raises:
        DataError: Ctrl-C was pressed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise DataError("interrupted; run the same command again to resume") from None


@contextmanager
def staging_folder(partial: Path, inputs: dict[str, object]) -> Iterator[None]:
    """Lock the partial folder for this process; refuse one that was started from other inputs.

    Raises:
        DataError: another process holds the folder, it was started from other inputs, it cannot be written, or Ctrl-C
            was pressed.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise DataError(cannot_write(partial, error)) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wanted = (json.dumps(inputs, indent=1) + "\n").encode()
        try:
            same = (partial / INPUTS_NAME).read_bytes() == wanted
        except FileNotFoundError:
            same = True
            write_whole(partial / INPUTS_NAME, wanted)
        if not same:
            raise DataError(
                f"{partial}: started from other files or settings; run with those again, or remove the folder"
            )
        with interruptible():
            yield
    except BlockingIOError:
        raise DataError(f"{partial}: another process is writing this set; wait for it, or stop it") from None
    finally:
        os.close(handle)


def save_progress(partial: Path, finished: FinishedShard, notes: list[str]) -> None:
    """Record a finished shard, so that a restarted command does not write it again."""
    record = {"shard": asdict(finished.shard), "members": finished.members.tolist(), "notes": notes}
    write_whole(partial / f"{finished.shard.name}.json", json.dumps(record).encode())


def load_progress(partial: Path, name: str) -> tuple[FinishedShard, list[str]] | None:
    """A shard that an earlier run finished, and its notes; None if there is none."""
    done = partial / f"{name}.json"
    if not done.is_file():
        return None
    earlier = json.loads(done.read_bytes())
    members = np.array([tuple(row) for row in earlier["members"]], dtype=MEMBER)
    return FinishedShard(Shard(**earlier["shard"]), members), earlier["notes"]


def publish_set(
    partial: Path, out: Path, finished: Sequence[FinishedShard], classes: Sequence[str], maps: MapFormat | None
) -> None:
    """Write the index, remove the progress records, and rename the folder to the set's name."""
    write_index(partial, finished, classes, maps)
    for shard in finished:
        (partial / f"{shard.shard.name}.json").unlink()
    (partial / INPUTS_NAME).unlink()
    publish(partial, out)


def parallel_map(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    processes: int,
    start_method: str = "fork",
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Results of ``function`` for every task, in the order of the tasks.

    Args:
        function, initializer: module-level functions; ``initializer(*initargs)`` runs first in every worker.
        processes: number of workers; 1 runs in this process.
        start_method: as multiprocessing names it.
    Raises:
        DataError: what ``function`` raises, or a worker was killed.
    """
    if processes == 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, tasks)
    else:
        context = multiprocessing.get_context(start_method)
        yield from _map_in_pool(function, tasks, processes, context, (initializer, initargs))


def _map_in_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int, context: Any, initargs: tuple[Any, ...]
) -> Iterator[Result]:
    with ProcessPoolExecutor(min(processes, len(tasks) or 1), context, _start_worker, initargs) as pool:
        workers: list[BaseProcess] = []
        try:
            # Not pool.map: it cancels what is pending when it is left early, and a pool whose workers are gone then
            # prints a traceback from its own thread, which may not set an exception on a cancelled future.
            pending: deque[Future[Result]] = deque()
            for task in tasks:  # a worker may die, and Ctrl-C be pressed, while these are still handed over
                pending.append(pool.submit(function, task))
                workers = list(pool._processes.values())
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            pool.shutdown(cancel_futures=True)
            raise DataError(
                f"a worker process was killed{_first_death(workers)}; run the same command again, with fewer "
                "--processes if memory ran out"
            ) from None
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:  # Ctrl-C, here or in the code that consumes the results
            for child in multiprocessing.active_children():
                child.terminate()  # unfinished work is done again
            raise


def _first_death(workers: Sequence[BaseProcess]) -> str:
    """Which worker ended how; the pool terminates the others."""
    for worker in workers:
        worker.join(timeout=5.0)
    ended = [worker for worker in workers if worker.exitcode]
    ended.sort(key=lambda worker: worker.exitcode == -signal.SIGTERM)
    return f": process {ended[0].pid} {how_it_ended(ended[0].exitcode or 0)}" if ended else ""


def _start_worker(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """Start a worker that exits with its parent: an orphan would hold the parent's lock on the folder for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent answers it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
