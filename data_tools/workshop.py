"""The folder a set is made in, and the processes that make it.

The folder is held by one process, resumable shard by shard, and renamed once everything is in it:

<set>.partial/
  plan.json               what the set is made from; another plan is refused
  shard-000000.tar        finished shards …
  shard-000000.tar.json   … and what is known of each: index line, members, notes
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from refiner_ds.data.index import MEMBER, MapFormat, Shard
from refiner_ds.data.writer import FinishedShard, cannot_write, publish, write_index, write_whole
from refiner_ds.errors import DataError

PLAN_NAME = "plan.json"

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C a refusal.

    Raises:
        DataError: it was pressed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise DataError("interrupted; repeat the command, and it goes on") from None


@contextmanager
def workshop(partial: Path, plan: dict[str, object]) -> Iterator[None]:
    """Hold the partial folder for this process alone; refuse one that was begun for something else.

    Raises:
        DataError: another process works there, it belongs to another plan, it cannot be written, or Ctrl-C was pressed.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise DataError(cannot_write(partial, error)) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wanted = (json.dumps(plan, indent=1) + "\n").encode()
        try:
            same = (partial / PLAN_NAME).read_bytes() == wanted
        except FileNotFoundError:
            same = True
            write_whole(partial / PLAN_NAME, wanted)
        if not same:
            raise DataError(f"{partial}: begun from other files or settings; repeat those, or remove the folder")
        with interruptible():
            yield
    except BlockingIOError:
        raise DataError(f"{partial}: another process is writing this set; wait for it, or end it") from None
    finally:
        os.close(handle)


def remember(partial: Path, finished: FinishedShard, notes: list[str]) -> None:
    """Keep what is known of a finished shard, for a run that goes on."""
    record = {"shard": asdict(finished.shard), "members": finished.members.tolist(), "notes": notes}
    write_whole(partial / f"{finished.shard.name}.json", json.dumps(record).encode())


def recall(partial: Path, name: str) -> tuple[FinishedShard, list[str]] | None:
    """A shard finished by an earlier run, and its notes."""
    done = partial / f"{name}.json"
    if not done.is_file():
        return None
    earlier = json.loads(done.read_bytes())
    members = np.array([tuple(row) for row in earlier["members"]], dtype=MEMBER)
    return FinishedShard(Shard(**earlier["shard"]), members), earlier["notes"]


def finish(
    partial: Path, out: Path, finished: Sequence[FinishedShard], classes: Sequence[str], maps: MapFormat | None
) -> None:
    """Write the index, clear away what only the making needed, and give the set its name."""
    write_index(partial, finished, classes, maps)
    for shard in finished:
        (partial / f"{shard.shard.name}.json").unlink()
    (partial / PLAN_NAME).unlink()
    publish(partial, out)


def spread(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    processes: int,
    start: str = "fork",
    begin: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Results of ``work`` for every task, in the order of the tasks, from several processes or from this one.

    Args:
        work, begin: functions of a module; ``begin(*given)`` is called first in every process that works.
        processes: 1 works here.
        start: how processes begin, as multiprocessing names it.
    Raises:
        DataError: what ``work`` raises, or a process was killed.
    """
    try:
        if processes == 1:
            if begin:
                begin(*given)
            yield from map(work, tasks)
        else:
            yield from _spread(work, tasks, processes, multiprocessing.get_context(start), (begin, given))
    except BrokenProcessPool:
        raise DataError(
            "a process was killed, for want of memory perhaps; repeat the command, with fewer --processes"
        ) from None


def _spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], processes: int, context: Any, entrance: tuple[Any, ...]
) -> Iterator[Result]:
    with ProcessPoolExecutor(min(processes, len(tasks) or 1), context, _enter, entrance) as pool:
        try:
            yield from pool.map(work, tasks)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, here or where the results are taken
                for child in multiprocessing.active_children():
                    child.terminate()  # what it was at is begun again
            pool.shutdown(cancel_futures=True)
            raise


def _enter(begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    """Begin a process of the pool: it ends with its parent, whose lock on the folder it would hold for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin:
        begin(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
