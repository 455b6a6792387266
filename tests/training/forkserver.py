"""Ranks that begin at once: a process that has imported what trains, and forks a rank as often as it is asked.

    python -m tests.training.forkserver SOCKET OWNER        OWNER: the process that it ends with

    a JSON line in     {"argv": […], "cwd": …, "ranks": [{"env": {…}, "out": FILE, "err": FILE}, …], "timeout": seconds}
    a JSON line out    {"codes": [exit code of each rank, minus the number of the signal that ended it], "late": …,
                        "cpu": seconds of all ranks}

A connection to the socket is one job. A process of its own answers it, since several processes of tests ask at once;
where the asker goes away its ranks are killed.

Importing torch, DeepSpeed and timm takes a rank four CPU seconds, many times what a tiny model trains for. Only others'
packages are imported here: a rank imports this project's modules itself, so that a test may replace parts of them. They
are started as Slurm starts them, by environment variables alone; what launchers do is tested with real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = (
    "torch", "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard", "timm",
    "torchvision", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "safetensors.torch", "pydantic",
    "webdataset", "xxhash", "zstandard", "simplejpeg", "sklearn.datasets", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "matplotlib.patches",
)  # fmt: skip
GRACE_SECONDS = 40  # for other ranks, once one has failed
PR_SET_PDEATHSIG = 1


def serve(path: Path, owner: int) -> None:
    """Answer who connects to ``path``, until the owner has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a process that has answered
    with socket.socket(socket.AF_UNIX) as listening:
        new = path.with_name("new")
        listening.bind(str(new))
        listening.listen(64)
        new.rename(path)  # who finds it can connect
        ended = os.pidfd_open(owner)
        while ended not in select.select([listening.fileno(), ended], [], [])[0]:
            asker = listening.accept()[0]
            if os.fork() == 0:
                try:
                    listening.close()
                    answer(asker)
                finally:
                    os._exit(0)
            asker.close()


def answer(asker: socket.socket) -> None:
    """Fork the ranks of one job and say what became of them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    received = b""
    while not received.endswith(b"\n"):
        received += (more := asker.recv(1 << 16))
        if not more:
            return
    job = json.loads(received)
    pids: list[int] = []
    for rank in job["ranks"]:
        pid = os.fork()
        if pid == 0:
            asker.close()
            end_with(lambda: become(job, rank))  # noqa: B023  (it does not return)
        pids.append(pid)
    found = wait(pids, job["timeout"], asker)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    asker.sendall(json.dumps({**found, "cpu": used.ru_utime + used.ru_stime}).encode() + b"\n")


def wait(pids: list[int], timeout: float, asker: socket.socket) -> dict[str, Any]:
    """Wait for ranks. None outlives the time-out or the asker, nor another's failure for long."""
    codes: dict[int, int] = {}
    late = False
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        gone = bool(select.select([asker], [], [], 0)[0])  # there is nothing more to read from it but its end
        if gone or time.monotonic() > end:
            late = late or not any(codes.values())
            for pid in set(pids) - set(codes):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": [codes[pid] for pid in pids], "late": late}


def become(job: dict[str, Any], rank: dict[str, Any]) -> None:
    """Turn this process into a rank and run its program to the end."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(rank["env"])
    for stream, file, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, rank["out"], os.O_WRONLY),
        (2, rank["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(file, flags | os.O_CREAT, 0o600), stream)
    for folder in reversed(rank["env"].get("PYTHONPATH", "").split(":")):
        if folder and folder not in sys.path:
            sys.path.insert(1, folder)
            if (custom := Path(folder, "sitecustomize.py")).exists():  # as Python does when it starts
                runpy.run_path(str(custom))
    run_program(list(job["argv"]))


def end_with(body: Callable[[], int | None]) -> NoReturn:
    """End this process with ``body``'s exit code, as Python would but for what takes a second: taking all apart."""
    code: int | str | None = 1
    try:
        code = body()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run_program(words: list[str]) -> None:
    """Run a script, or ``-m`` and a module, with its arguments, as Python would."""
    sys.argv = words
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def preload() -> None:
    """Import what every rank will."""
    from refiner_ds.training.logs import silence_libraries

    silence_libraries()
    for package in PACKAGES:
        importlib.import_module(package)
    _ = importlib.import_module("deepspeed.ops").__compatible_ops__  # runs compilers, once
    gc.collect()
    gc.freeze()  # a rank's collections need not go through all of that, nor copy its memory


if __name__ == "__main__":
    preload()
    serve(Path(sys.argv[1]), int(sys.argv[2]))
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
