"""A loader worker that is killed is one sentence: which one, how, with how much memory; and not exit code 2."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator

import pytest

from refiner_ds.data import workers
from refiner_ds.data.batch import Batch
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.data.workers import WorkerWatch, explain_worker_death
from refiner_ds.errors import WorkerError
from refiner_ds.exit_codes import CRASHED
from tests.data.conftest import views

HOW = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 5, "workers": 2}


def begun(index: ShardIndex) -> tuple[Generator[Batch, None, None], list[int]]:
    """A running loader that has delivered its first batch, and the process numbers of its workers."""
    before = set(multiprocessing.active_children())
    batches = iter(train_batches(index, views(8), **HOW))  # type: ignore[arg-type]
    next(batches)
    return batches, sorted(child.pid or 0 for child in set(multiprocessing.active_children()) - before)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker_is_named_while_its_batches_are_waited_for(
    make_set: Callable[..., ShardIndex], number: int
) -> None:
    batches, running = begun(make_set(24))
    os.kill(victim := running[number], signal.SIGKILL)
    with pytest.raises(WorkerError) as told:
        for _ in batches:
            pass
    assert re.fullmatch(
        rf"DataLoader worker {number} of 2 \(process {victim}\) was killed by signal: Killed \(SIGKILL\); it was last "
        r"seen with [1-9][\d,]* MiB of memory, all 2 with [1-9][\d,]* MiB; if nobody killed it, memory ran out: .*",
        str(told.value),
    )


def test_a_killed_worker_is_named_while_the_training_process_computes(make_set: Callable[..., ShardIndex]) -> None:
    """Torch's handler of SIGCHLD raises wherever the process is: here, where it takes no batch."""
    with pytest.raises(WorkerError, match="DataLoader worker 0 of 2 .* was killed by signal: Segmentation fault"):
        with explain_worker_death():
            batches, running = begun(make_set(24))  # noqa: F841  held, or its workers would be ended
            os.kill(running[0], signal.SIGSEGV)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                sum(range(1000))


def test_the_kernels_own_count_tells_that_memory_ran_out(
    make_set: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(workers, "_killed_for_memory", lambda: next(counts))
    sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    sleeper.start()
    watch = WorkerWatch([sleeper])
    watch.look()
    assert watch.death() is None
    sleeper.kill()
    sleeper.join()
    assert "the kernel killed it, out of memory: use fewer refiner.data.workers" in str(watch.death())


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes do not agree"), explain_worker_death():
        raise RuntimeError("shapes do not agree")


COMMAND = """
import multiprocessing, os, signal, sys
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.errors import report_errors
from tests.data.conftest import views

@report_errors
def main():
    how = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 5, "workers": 2}
    batches = iter(train_batches(ShardIndex.load(sys.argv[1]), views(8), **how))
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in batches:
        pass

sys.exit(main())
"""


def test_a_command_ends_with_one_sentence_and_an_exit_code_that_allows_another_attempt(
    make_set: Callable[..., ShardIndex],
) -> None:
    folder = make_set(24).folder
    done = subprocess.run([sys.executable, "-c", COMMAND, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == CRASHED
    assert done.stderr.startswith("error: DataLoader worker ") and len(done.stderr.splitlines()) == 1
