"""Noticing that the launcher is gone: the ``deepspeed`` or ``torchrun`` command that started this rank.

Both die of some signals without telling their ranks, which would then train on with nobody to end them, restart them
or pass on a signal. The kernel tells a process that its parent has died (prctl(2), PR_SET_PDEATHSIG). It does not tell
of a grandparent, and ``deepspeed`` is one: the command, its per-node launcher, the rank. So a thread looks, too.

A shell is nobody's launcher: who leaves one with ``nohup`` wants the run to go on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = {
    "deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate",
    "refiner_ds.train", "refiner_ds/train.py",  # parent of two ranks on a machine without GPUs
    "refiner_ds.restart", "refiner_ds/restart.py", "launch.local", "launch/local.py",
}  # fmt: skip
PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Process:
    """A process, distinguished from a later one with the same PID by the clock tick it started at."""

    pid: int
    began: str
    name: str

    @staticmethod
    def at(pid: int) -> Process | None:
        """The process of this number now; None where there is none, or only what is left of one."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # the command in parentheses may hold spaces
        if fields[0] in "ZX":
            return None
        return Process(pid, fields[19], program(words))

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return (now := Process.at(self.pid)) is not None and now.began == self.began


def program(words: list[str]) -> str:
    """What a command line runs: the module or script behind ``python``, else the command's own name.

    A script keeps its folder's name, so that ``refiner_ds/train.py`` is distinguished from other people's ``train.py``.
    """
    if not words:
        return ""
    command = Path(words[0]).name
    if not command.startswith("python"):
        return command
    rest = iter(words[1:])
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if word in ("-X", "-W"):
            next(rest, None)
        elif not word.startswith("-"):
            script = Path(word)
            return script.name if script.suffix != ".py" else f"{script.absolute().parent.name}/{script.name}"
    return command


def launchers(pid: int | None = None) -> list[Process]:
    """The launchers among a process's ancestors, the nearest first.

    Args:
        pid: of the process; None: this one.
    """
    found = []
    above = _parent(os.getpid() if pid is None else pid)
    while above > 0:
        process = Process.at(above)
        if process is not None and process.name in LAUNCHERS:
            found.append(process)
        above = _parent(above)
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def follow_launchers(ask: Callable[[str], None]) -> None:
    """Call ``ask(sentence)`` once when a launcher of this process has died, from a thread of its own.

    The kernel sends TERM besides, at once, when the nearest of them is this process's parent.
    """
    followed = launchers()
    if not followed:
        if os.getppid() == 1 and ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ):
            ask("the launcher that started this process is gone")  # it died while this process was starting
        return
    if followed[0].pid == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_look, args=(followed, ask), name="launchers", daemon=True).start()


def _look(followed: list[Process], ask: Callable[[str], None]) -> None:
    never = threading.Event()
    while True:
        for process in followed:
            if not process.is_alive:
                ask(f"the launcher is gone ({process.name}, process {process.pid})")
                return
        never.wait(LOOK_SECONDS)
