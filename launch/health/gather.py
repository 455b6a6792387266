"""Starts the tasks of an examination, on this machine or on nodes of Slurm, and gathers what they print."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from refiner_ds.errors import LaunchError

from ..slurm import NoSlurm, outside_allocation
from .node import Node, read_node
from .probe import MEET_MARK, NODE_MARK, SHARED_MARK
from .shared import Shared, read_shared

ROOT = Path(__file__).resolve().parents[len(__name__.split(".")) - 1]  # of the clone, or of what is installed
PROBE = f"{__package__}.probe"
LABEL = re.compile(r"\s*(\d+): ?(.*)")  # srun --label
SECONDS = 55.0  # from the first line that a task prints; one that has not finished by then hangs


@dataclass
class Reports:
    """What the tasks have printed.

    Attributes:
        tasks: how many there should be.
        nodes, shared: by rank.
        stderr: the last line of what a task printed there, by rank; −1 where srun spoke.
        ended: whether all tasks ended by themselves.
        meeting: where the first task says that they meet, once it has; JSON.
    """

    tasks: int
    nodes: dict[int, Node] = field(default_factory=dict)
    shared: dict[int, Shared] = field(default_factory=dict)
    stderr: dict[int, str] = field(default_factory=dict)
    ended: bool = True
    meeting: str = ""

    def add(self, rank: int, line: str) -> bool:
        """Take a line of a task's output; whether it was a report."""
        mark, _, stored = line.partition(" ")
        if mark == MEET_MARK:
            self.meeting = stored
            return True
        if mark not in (NODE_MARK, SHARED_MARK):
            return False
        if mark == NODE_MARK:
            self.nodes[rank] = read_node(json.loads(stored))
        else:
            self.shared[rank] = read_shared(json.loads(stored))
        return True


def run_here(tasks: int, options: Sequence[str], gpus: Sequence[str], environment: dict[str, str]) -> Reports:
    """Run the tasks on this machine, each on one of ``gpus`` where there are any, with these further variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": str(tasks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [
        {**environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus), **meeting, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        for rank in range(tasks)
    ]
    command = [sys.executable, "-m", PROBE, *options]
    return run_tasks([command] * tasks, environments)


def run_tasks(
    commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], seconds: float = SECONDS
) -> Reports:
    """Run one process a task, each with its command and its further environment variables."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    processes = [
        _start(command, os.environ | path | more) for command, more in zip(commands, environments, strict=True)
    ]
    reports = Reports(len(processes))
    readers = [_Reader(process, reports, rank) for rank, process in enumerate(processes)]
    _wait(processes, readers, reports, seconds)
    return reports


def run_on_slurm(
    flags: Sequence[str], tasks: int, options: Sequence[str], setup: Sequence[str], environment: dict[str, str]
) -> Reports:
    """Run the tasks on nodes that Slurm gives.

    Args:
        flags: of srun.
        setup: shell lines before each task, as a cluster profile has them.

    Only the first task knows the address and a free port of its node. It prints them, and srun hands them to all tasks
    as their input: that works where neither names nor the shared folder do.

    Raises:
        LaunchError: there is no Slurm, or it gives no nodes; with its words.
    """
    variables = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    probe = shlex.join((sys.executable, "-m", PROBE, *options))
    script = "\n".join((*setup, *variables, path, "export OMP_NUM_THREADS=1", f"exec {probe}"))
    outside = outside_allocation(os.environ)
    try:
        process = _start(("srun", "--label", *flags, "bash", "-c", script), outside, subprocess.PIPE)
    except FileNotFoundError:
        raise NoSlurm("there is no Slurm here (srun not found); leave out --nodes to examine this machine") from None
    reports = Reports(tasks)
    _wait([process], [_Reader(process, reports, None)], reports, SECONDS)
    if not reports.nodes and -1 in reports.stderr and not set(reports.stderr) - {-1}:
        raise LaunchError(f"Slurm gives no nodes: {reports.stderr[-1]}")
    return reports


def _start(
    command: Sequence[str], environment: dict[str, str], told: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


class _Reader:
    """Reads a process's output as it comes; ``rank`` None: srun labels the lines with their ranks."""

    def __init__(self, process: subprocess.Popen[str], reports: Reports, rank: int | None) -> None:
        self._reports = reports
        self._rank = rank
        self.began: float | None = None
        self._threads = [
            threading.Thread(target=self._read, args=(stream, stream is process.stderr), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[str], is_stderr: bool) -> None:
        for line in stream:
            rank, text = (self._rank, line.strip()) if self._rank is not None else _unlabelled(line)
            if rank >= 0 and self.began is None:
                self.began = time.monotonic()
            if text and not self._reports.add(rank, text) and is_stderr:
                self._reports.stderr[rank] = text

    def join(self) -> None:
        """Wait until all has been read."""
        for thread in self._threads:
            thread.join(timeout=5)


def _unlabelled(line: str) -> tuple[int, str]:
    found = LABEL.fullmatch(line.rstrip("\n"))
    if found:
        return int(found[1]), found[2].strip()
    return -1, re.sub(r"^srun: (error: )?", "", line.strip())


def _tell(processes: Sequence[subprocess.Popen[str]], line: str) -> None:
    """Hand a line to the processes that wait for one, and end their input."""
    for process in processes:
        if process.stdin and not process.stdin.closed:
            with suppress(BrokenPipeError):
                process.stdin.write(f"{line}\n")
                process.stdin.close()


def _wait(
    processes: Sequence[subprocess.Popen[str]], readers: Sequence[_Reader], reports: Reports, seconds: float
) -> None:
    try:
        while any(process.poll() is None for process in processes):
            begun = [reader.began for reader in readers if reader.began is not None]
            if begun and time.monotonic() - min(begun) > seconds:
                reports.ended = False
                break
            if reports.meeting:
                _tell(processes, reports.meeting)
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for reader in readers:
        reader.join()
