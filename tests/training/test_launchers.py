"""Nobody is left behind, whichever launcher started the ranks and whatever kills it; and what each one returns.

One run folder goes through all of them, one after the other: each is killed in its own way, and the next continues.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.parent import Process
from tests.training.launched import ROOT, environment, run
from tests.training.test_resume import TINY

TRAIN = ROOT / "refiner_ds" / "train.py"
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29611"]
LONE_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "29612"]

# launcher, who is signalled, and how: the launcher's own process, one rank, or all as a terminal does.
CASES = [
    (TORCHRUN, "launcher", signal.SIGUSR2),
    (DEEPSPEED, "launcher", signal.SIGTERM),
    (LONE_DEEPSPEED, "launcher", signal.SIGKILL),
    (TORCHRUN, "launcher", signal.SIGKILL),
    (DEEPSPEED, "launcher", signal.SIGUSR2),
    (TORCHRUN, "all", signal.SIGINT),
    (LONE_DEEPSPEED, "all", signal.SIGHUP),
    (DEEPSPEED, "rank", signal.SIGTERM),
]


def arguments(output: Path, **more: object) -> list[str]:
    """A run that would take long to end by itself, and saves at its end only."""
    keys = {**TINY, "refiner.run.output": str(output), "refiner.recipe.epochs": 100, "refiner.data.workers": 1}
    keys |= {"refiner.run.checkpoint_epochs": 1000, "refiner.run.eval_epochs": 1000, **more}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@contextmanager
def started(launcher: list[str], *words: str, output: Path | int = subprocess.DEVNULL) -> Iterator[subprocess.Popen]:
    """A launched training, in a session of its own, none of it left afterwards."""
    process = subprocess.Popen(
        [*launcher, str(TRAIN), *words], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def processes_of(session: int) -> list[int]:
    """The processes of a session, those whose parents are gone included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and Process.at(int(entry.name)) is not None:
            with open(entry / "stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[3]) == session:
                    found.append(int(entry.name))
    return found


def steps(run: Path) -> int:
    return read_metrics(run, "train")[-1]["step"] if (run / "metrics.jsonl").exists() and read_metrics(run) else 0


def saved(run: Path) -> int:
    latest = RunFolder(run).latest_checkpoint()
    return read_state(latest).step if latest else 0


def wait_for(true, seconds: float = 120, said=lambda: "") -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.1)


def lock_holder(run: Path) -> int:
    return json.loads((run / "lock").read_text())["pid"]


@pytest.mark.timeout(600)
def test_whatever_kills_a_launcher_its_ranks_save_and_leave(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    for launcher, whom, number in CASES:
        case = f"{launcher[2:4]} {whom} {number.name}"
        before = saved(folder)
        with started(launcher, *arguments(tmp_path)) as process:
            wait_for(lambda: steps(folder) >= before + 2 and (folder / "lock").exists(), said=lambda: case)  # noqa: B023
            if whom == "launcher":
                process.send_signal(number)
            elif whom == "rank":
                os.kill(lock_holder(folder), number)
            else:
                os.killpg(process.pid, number)
            wait_for(lambda: not processes_of(process.pid), 60, lambda: f"{case}: left {processes_of(process.pid)}")  # noqa: B023
            code, said = process.wait(), process.stdout.read()  # type: ignore[union-attr]
        assert saved(folder) > before, f"{case}: nothing was saved\n{said}"
        assert not (folder / "lock").exists(), case
        if "--num_accelerators" in launcher and whom == "rank":
            assert code == 75, case
