"""``refiner_ds.restart`` in a process that has imported everything, and forks launchers and ranks from itself.

    python -m tests.drill.preloaded NEXT …          … as for python -m refiner_ds.restart

The start of Python and its imports are most of what a restart costs, so that a drill of real commands has a tenth of
the events. What is forked here is the project's own: the restarting command, and the parent of ranks that ``deepspeed``
starts on a machine without GPUs. NEXT is a file that says how the next start differs from the one before, as on a
cluster that gives what nodes are left:

    {"ranks": 2, "arguments": ["--set", "refiner.recipe.epochs=3"]}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from refiner_ds import restart
from refiner_ds.training import parent, relaunch
from refiner_ds.training.signals import STOPPING
from tests.training.forkserver import end_with, preload, run_program
from tests.training.launched import ROOT

NAME = "tests.drill.preloaded"
TRAIN = str(ROOT / "refiner_ds" / "train.py")
LOOK_SECONDS = 0.02
parent.LAUNCHERS.add(NAME)  # ranks look out for it as for any other


class Forked:
    """A function in a process of its own, with as much of `subprocess.Popen` as parents of ranks use."""

    def __init__(self, body: Callable[[], int]) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be(body)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(NAME, timeout or 0.0)
            time.sleep(LOOK_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """TERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """KILL."""
        self.send_signal(signal.SIGKILL)


def _be(body: Callable[[], int]) -> NoReturn:
    """Be a process that was just started."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with(body)


def _rank(command: list[str], env: dict[str, str]) -> int:
    os.environ.clear()
    os.environ.update(env)
    run_program(command[command.index(TRAIN) :])
    return 0


def _launcher(command: list[str], said: dict[str, Any]) -> int:
    arguments = command[command.index(TRAIN) + 1 :]
    return relaunch.run_processes(Path(TRAIN), [*arguments, *said["arguments"]], said["ranks"])


def main() -> int:
    """Run the command; returns its exit code."""
    preload()
    following = Path(sys.argv[1])

    def launcher(command: list[str]) -> Forked:
        return Forked(lambda: _launcher(command, json.loads(following.read_text())))

    def rank(command: list[str], env: dict[str, str]) -> Forked:
        return Forked(lambda: _rank(command, env))

    forks: Any = SimpleNamespace(Popen=rank, TimeoutExpired=subprocess.TimeoutExpired)
    relaunch.subprocess = forks  # type: ignore[attr-defined]
    forks = SimpleNamespace(Popen=launcher)
    restart.subprocess = forks  # type: ignore[attr-defined]
    return restart.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
