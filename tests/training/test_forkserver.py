"""What forks ranks for all tests: several ask at once, no rank outlives who asked, and it ends with its owner."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refiner_ds.training.parent import Process
from tests.training.forkserver import serve
from tests.training.launched import ranks

MEETS = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
"""
HANGS = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


def wait_for(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_that_ask_at_once_are_answered_at_once(tmp_path: Path) -> None:
    script = tmp_path / "meets.py"
    script.write_text(MEETS)
    with ThreadPoolExecutor(2) as pool:
        pairs = (("one", "two"), ("two", "one"))
        both = [pool.submit(ranks, script, tmp_path / mine, tmp_path / theirs, processes=1) for mine, theirs in pairs]
    assert [one.result().returncode for one in both] == [0, 0]


def test_ranks_that_take_too_long_are_killed_and_named(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    with pytest.raises(AssertionError, match="ran past 3 s"):
        ranks(script, tmp_path / "pid", processes=1, timeout=3)
    assert not (rank := Process.at(int((tmp_path / "pid").read_text()))) or not rank.is_alive


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """One of this test's own, that has imported nothing: its socket, its process, and the process that it ends with."""
    pids: list[int] = []
    for does in (lambda: time.sleep(600), lambda: serve(tmp_path / "socket", pids[0])):
        if not (pid := os.fork()):
            try:
                does()
            finally:
                os._exit(0)
        pids.append(pid)
    wait_for((tmp_path / "socket").exists)
    yield tmp_path / "socket", pids[1], pids[0]
    for pid in pids:
        if (left := Process.at(pid)) is not None and left.is_alive:
            os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("goes", ["the asker", "the owner"])
def test_ranks_are_killed_when_nobody_waits_for_them_any_more(
    goes: str, server: tuple[Path, int, int], tmp_path: Path
) -> None:
    path, process, owner = server
    script, told = tmp_path / "hangs.py", tmp_path / "pid"
    script.write_text(HANGS)
    rank = {"env": dict(os.environ), "out": f"{tmp_path}/out", "err": f"{tmp_path}/err"}
    job = {"argv": [str(script), str(told)], "cwd": str(tmp_path), "ranks": [rank], "timeout": 600}
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(path))
        asker.sendall(json.dumps(job).encode() + b"\n")
        wait_for(lambda: told.exists() and told.read_text())
        found = Process.at(int(told.read_text()))
        assert found is not None and found.is_alive
        if goes == "the owner":
            os.kill(owner, 9)
            wait_for(lambda: not (one := Process.at(process)) or not one.is_alive)
            wait_for(lambda: not found.is_alive)
    wait_for(lambda: not found.is_alive)
