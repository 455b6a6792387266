"""Two runs never train in one folder, and a dead one's folder is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from refiner_ds.errors import LaunchError
from refiner_ds.training.run_lock import Holder, RunLock, read_holder


def held_by(file: Path, **changes: object) -> Holder:
    """A lock as another process, perhaps on another machine, left it."""
    holder = replace(Holder.this_process(), **changes)  # type: ignore[arg-type]
    file.write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_run_is_refused_and_both_are_named(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "lock"), RunLock(tmp_path / "lock")
    assert first.acquire() is None
    mine = f"process {os.getpid()} on {os.uname().nodename}"
    said = f"{tmp_path}: {mine} trains here already, and this is {mine}; .*refiner.run.name"
    with pytest.raises(LaunchError, match=said):
        second.acquire()
    second.release()
    assert read_holder(tmp_path / "lock") is not None  # not the second's to give back
    first.release()
    assert not list(tmp_path.iterdir())
    assert second.acquire() is None
    second.release()


def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held_by(tmp_path / "lock", pid=ended.pid, token="other")
    lock = RunLock(tmp_path / "lock")
    said = lock.acquire()
    assert said and f"from process {ended.pid} on" in said and "has ended" in said
    lock.release()
    held_by(tmp_path / "lock", began="1", token="other")  # this process's number, given to it after the holder's death
    assert RunLock(tmp_path / "lock").acquire()


def test_a_silent_holder_on_another_machine_is_taken_over_and_a_living_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    held_by(file, machine="another", host="node7", pid=1, token="other")
    os.utime(file, (time.time() - 3600,) * 2)
    said = RunLock(file, silent_seconds=60).acquire()
    assert said and "node7" in said and "silent" in said

    held_by(file, machine="another", host="node7", pid=1, token="third")
    with ThreadPoolExecutor() as pool:
        refused = pool.submit(RunLock(file, touch_seconds=0.2, silent_seconds=30).acquire)
        while not refused.done():
            time.sleep(0.05)
            os.utime(file)
    assert isinstance(refused.exception(), LaunchError)


def test_of_many_that_find_a_dead_run_one_takes_over(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for attempt in range(10):
        held_by(file, began="1", token=f"dead {attempt}")
        locks = [RunLock(file) for _ in range(8)]

        def acquired(lock: RunLock) -> bool:
            try:
                lock.acquire()
            except LaunchError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(acquired, locks)) == 1
        for lock in locks:
            lock.release()
        assert not list(tmp_path.iterdir())


def test_a_lock_that_was_cut_short_is_judged_by_its_age(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.write_text("{")
    os.utime(file, (time.time() - 3600,) * 2)
    assert RunLock(file).acquire()


def test_a_holder_that_lost_its_lock_is_told(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = RunLock(tmp_path / "lock", lost.append, touch_seconds=0.05)
    lock.acquire()
    held_by(tmp_path / "lock", machine="another", host="node7", token="other")
    end = time.monotonic() + 120
    while not lost and time.monotonic() < end:
        time.sleep(0.05)
    assert lost and "taken over by" in lost[0] and "node7" in lost[0]
    lock.release()
    assert (tmp_path / "lock").exists()
