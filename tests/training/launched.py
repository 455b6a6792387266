"""Starting a script of the tests in several real processes, with a time-out, and reading what it found.

`ranks` forks them from a process that has imported torch and DeepSpeed (`forkserver`); `run` starts everything anew,
for what is to be tested with a launcher or from Python's first line on.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """What a user's shell would hold, with one thread a process and the package found from anywhere."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(*command: str | Path, timeout: float = 240, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Any:
    """Run a command to its end, its whole process group gone afterwards."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env or environment(),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"{command} ran past {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(server: subprocess.Popen[str]) -> None:
    """Let a forkserver end, which it does when nobody can ask it any more."""
    assert server.stdin
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


def forkserver() -> subprocess.Popen[str]:
    """The process that forks ranks: one for each process of tests, started when it is first needed."""
    return _forkserver(os.getpid())


@cache
def _forkserver(asker: int) -> subprocess.Popen[str]:
    """That of one process: one that was forked from it may see other mounts, and must not read another's answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.forkserver"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    atexit.register(end, process)
    return process


def ranks(
    *command: str | Path,
    processes: int = 2,
    timeout: float = 240,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A script, or ``-m`` and a module, with its arguments, as so many ranks of one group.

    Returns:
        The exit code of the first rank that failed, or 0; standard output and error of all ranks, one after the other.
    """
    server = forkserver()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = probe.getsockname()[1]
        probe.close()
        started = []
        for rank in range(processes):
            mine = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            files = {stream: f"{folder}/{rank}.{stream}" for stream in ("out", "err")}
            started.append({"env": {**(env or environment()), **mine}, **files})
        job = {"argv": [str(part) for part in command], "cwd": str(cwd), "ranks": started, "timeout": timeout}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        ended = json.loads(server.stdout.readline())
        out, err = ("".join(Path(one[stream]).read_text() for one in started) for stream in ("out", "err"))
    assert not ended["late"], f"{command} ran past {timeout} s\n{out[-3000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess(command, next((code for code in ended["codes"] if code), 0), out, err)


@contextmanager
def running_ranks(*command: str | Path, **settings: Any) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """`ranks` while the block runs, which may signal them; what becomes of them is the future's result."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(ranks, *command, **settings)


def findings(script: str, folder: Path, processes: int = 2, timeout: float = 280) -> dict[str, Any]:
    """Run a script beside this file on several ranks; it writes what it found to the file it is given."""
    report = folder / f"{Path(script).stem}.json"
    done = ranks(Path(__file__).parent / script, report, processes=processes, timeout=timeout)
    assert done.returncode == 0, f"{script} failed\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(report.read_text())
