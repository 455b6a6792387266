"""Two processes on a CPU machine when the plain ``deepspeed refiner_ds/train.py`` started one.

The deepspeed launcher starts one process a GPU, and on a machine without any it starts a single one. A lone process
that knows it came from that launcher becomes the parent of two. ``python refiner_ds/train.py`` stays one process.

Torch's own agent would do, but for two things: it dies of USR2, and it loses the exit codes of ranks that it was asked
to stop. This parent passes every request on and hands the ranks' exit code back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from refiner_ds.exit_codes import FINISHED
from refiner_ds.training.parent import follow_launchers
from refiner_ds.training.signals import STOPPING
from refiner_ds.training.world import free_port

CPU_PROCESSES = 2
LAST_SECONDS = 30.0  # for the others to leave, once one has
LOOK_SECONDS = 0.1


def is_lone_cpu_child_of_deepspeed() -> bool:
    """Whether the deepspeed launcher started exactly this one process on a machine without GPUs."""
    from_deepspeed = "CROSS_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return from_deepspeed and os.environ.get("WORLD_SIZE") == "1" and not torch.cuda.is_available()


def run_processes(script: Path, arguments: list[str], count: int = CPU_PROCESSES) -> int:
    """Run ``script`` in ``count`` processes on this machine. Returns the exit code of the first to fail, or 0."""
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or count) // count)),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in ("CROSS_RANK", "CROSS_SIZE")}
    processes: list[subprocess.Popen[bytes]] = []
    with _passing_on(processes):
        for rank in range(count):
            whoami = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-u", str(script), *arguments]
            processes.append(subprocess.Popen(command, env={**inherited, **group, **whoami}))
        return _wait(processes)


@contextmanager
def _passing_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass every request to stop on to the ranks, a launcher's death included."""

    def tell(number: int) -> None:
        for process in processes:
            process.send_signal(number)  # nothing to one that has ended

    before = {
        number: signal.signal(number, lambda number, frame: tell(number))
        for number in STOPPING
        if signal.getsignal(number) != signal.SIG_IGN
    }
    follow_launchers(lambda reason: tell(signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            break
        if None not in codes:
            return FINISHED
        time.sleep(LOOK_SECONDS)
    end = time.monotonic() + LAST_SECONDS
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return 128 - failed[0] if failed[0] < 0 else failed[0]
