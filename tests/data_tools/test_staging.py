"""Worker processes of the data tools."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from data_tools.staging import parallel_map
from refiner_ds.errors import DataError

TASKS = range(50)  # many more than a pool hands to its workers ahead of time
MANY = range(5000)  # telling them all that the pool is broken takes long enough to be interrupted


def slow(task: int) -> int:
    time.sleep(0.02)
    return task


def note_in(folder: Path) -> None:
    os.chdir(folder)


def noted(task: int) -> None:
    time.sleep(1.0)
    Path(str(task)).touch()


def killed_by_the_fourth(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return slow(task)


class HandedOver(Sequence[int]):
    """Tasks whose handing over is interrupted, by Ctrl-C or while a worker dies of the fourth."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.meanwhile = meanwhile

    def __len__(self) -> int:
        return len(TASKS)

    def __getitem__(self, index: Any) -> Any:
        return TASKS[index]

    def __iter__(self) -> Iterator[int]:
        yield from TASKS[:10]
        self.meanwhile()
        yield from TASKS[10:]


def until_the_workers_are_gone() -> None:
    deadline = time.monotonic() + 60.0
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def wrong_at_the_fourth(task: int) -> int:
    if task == 3:
        raise DataError("the fourth is wrong")
    return slow(task)


@pytest.fixture
def thread_errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a thread would have printed a traceback of."""
    raised: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda given: raised.append(repr(given.exc_value)))
    return raised


def test_results_come_in_the_order_of_the_tasks() -> None:
    assert list(parallel_map(slow, TASKS, 2)) == list(TASKS)


@pytest.fixture
def late_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's thread finds that the workers are gone before it hears that the pool is shut down."""
    children = multiprocessing.active_children

    def each_then_wait() -> Iterator[BaseProcess]:
        yield from children()
        time.sleep(0.3)

    monkeypatch.setattr(multiprocessing, "active_children", each_then_wait)


@pytest.mark.usefixtures("late_shutdown")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_stopping_with_tasks_left_raises_nothing_else(stop: type[BaseException], thread_errors: list[str]) -> None:
    before = set(threading.enumerate())
    results = parallel_map(slow, TASKS, 2)
    assert list(islice(results, 2)) == [0, 1]
    with pytest.raises(stop):
        results.throw(stop)  # type: ignore[attr-defined]  # a generator
    assert set(threading.enumerate()) == before and not thread_errors


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (killed_by_the_fourth, r"process \d+ was killed by signal: Killed .SIGKILL.; run"),
        (wrong_at_the_fourth, "the fourth"),
    ],
)
def test_failing_with_tasks_left_raises_nothing_else(
    function: Callable[[int], int], said: str, thread_errors: list[str]
) -> None:
    with pytest.raises(DataError, match=said):
        list(parallel_map(function, MANY, 2))
    assert not thread_errors


def test_worker_that_dies_while_tasks_are_handed_over_is_named_as_any_other(thread_errors: list[str]) -> None:
    tasks = HandedOver(until_the_workers_are_gone)
    with pytest.raises(DataError, match=r"process \d+ was killed by signal: Killed .SIGKILL.; run"):
        list(parallel_map(killed_by_the_fourth, tasks, 2))
    assert not thread_errors


def test_ctrl_c_while_tasks_are_handed_over_leaves_the_rest_undone(thread_errors: list[str], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        list(parallel_map(noted, HandedOver(ctrl_c), 2, initializer=note_in, initargs=(tmp_path,)))
    assert len(list(tmp_path.iterdir())) < 10 and set(threading.enumerate()) == before and not thread_errors
