"""Ranks that begin at once: a process that has imported what trains, and forks a rank as often as it is asked.

    a JSON line in     {"argv": […], "cwd": …, "ranks": [{"env": {…}, "out": FILE, "err": FILE}, …], "timeout": seconds}
    a JSON line out    {"codes": [exit code of each rank, minus the number of the signal that ended it], "late": …}

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
import runpy
import signal
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


def serve() -> None:
    """Fork ranks until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        pids: list[int] = []
        for rank in job["ranks"]:
            pid = os.fork()
            if pid == 0:
                end_with(lambda: become(job, rank))  # noqa: B023  (it does not return)
            pids.append(pid)
        print(json.dumps(wait(pids, job["timeout"])), flush=True)


def wait(pids: list[int], timeout: float) -> dict[str, Any]:
    """Wait for ranks. None outlives the time-out, nor another's failure for long."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": [codes[pid] for pid in pids], "late": time.monotonic() > end and not any(codes.values())}


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
    serve()
