"""Starting a script of the tests in several real processes, with a time-out, and reading what it found.

`ranks` forks them from a process that has imported torch and DeepSpeed (`forkserver`); `run` starts everything anew,
for what is to be tested with a launcher or from Python's first line on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests import costs

ROOT = Path(__file__).resolve().parents[2]
SHARED = "REFINER_TESTS_FORKSERVER"  # the variable that says where all processes of tests find theirs
THIS_PROCESS = os.getpid()


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


def connected() -> socket.socket:
    """A connection to the forkserver, which is started where there is none yet.

    All processes of tests share one. A process that was forked from one of them may see other mounts, and has its own.
    """
    return _connected(os.getpid())


def _connected(asker: int) -> socket.socket:
    owner, folder = _place(asker)
    folder.mkdir(mode=0o700, exist_ok=True)
    path, log = folder / "socket", folder / "log"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = socket.socket(socket.AF_UNIX)
        with suppress(FileNotFoundError, ConnectionRefusedError):
            server.connect(str(path))
            return server
        path.unlink(missing_ok=True)
        command = (sys.executable, "-m", "tests.training.forkserver", str(path), str(owner))
        with log.open("w") as out:  # detached: it is nobody's child, and counts for no file of tests
            subprocess.run(
                (sys.executable, "-S", "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:])", *command),
                check=True, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 240
        while not path.exists():
            assert time.monotonic() < end, f"no forkserver\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
        server.connect(str(path))
        return server


@cache
def _place(asker: int) -> tuple[int, Path]:
    """The process that a forkserver belongs to, and its folder."""
    if asker == THIS_PROCESS and (shared := os.environ.get(SHARED)):
        owner, _, folder = shared.partition(":")
        return int(owner), Path(folder)
    return asker, Path(tempfile.mkdtemp(prefix="forkserver-"))


def share_forkserver() -> None:
    """Have the processes that this one starts share one, which ends with this one."""
    os.environ[SHARED] = f"{os.getpid()}:{tempfile.gettempdir()}/forkserver-{os.getpid()}-{time.time_ns()}"


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
        with connected() as server, server.makefile() as answer:
            server.sendall(json.dumps(job).encode() + b"\n")
            ended = json.loads(answer.readline())
        costs.count(ended["cpu"])
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
