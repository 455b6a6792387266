"""One run that events happen to, under a command that starts it again; nobody else touches it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.parent import Process, launchers
from refiner_ds.training.world import free_port
from tests.data.small_disk import SmallDisk
from tests.drill import preloaded
from tests.drill.events import CHANGES, EVENTS, FULL, NAN, Running
from tests.training.launched import ROOT, environment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LOOK_SECONDS = 0.2
STEPS_AN_EPOCH, STEPS_A_SAVE, LAST_STEPS = 90, 4, 8
ENDLESS = 1000.0  # epochs
KEYS: dict[str, object] = {
    "refiner.model.depth": 2, "refiner.model.embed_dim": 16, "refiner.model.num_heads": 2,
    "refiner.model.patch_size": 14, "refiner.model.stem_chs": [4, 4, 4], "refiner.model.drop": 0.1,
    "refiner.model.drop_path": 0.1,
    "refiner.recipe.schedule": "constant", "refiner.recipe.warmup_epochs": 0.1, "refiner.recipe.cooldown_epochs": 0,
    "refiner.data.workers": 1, "refiner.run.log_steps": 1, "refiner.run.checkpoint_epochs": None,
    "refiner.run.checkpoint_steps": STEPS_A_SAVE, "refiner.run.eval_epochs": 10000, "refiner.run.picture_epochs": None,
    "refiner.run.hang_seconds": 8, "refiner.run.on_divergence": "rollback", "refiner.run.rollbacks": 10000,
    "train_batch_size": 16,
}  # fmt: skip


def arguments(output: Path, epochs: float) -> list[str]:
    """The training command's, for so many epochs: the same run, whatever their number."""
    keys = {**KEYS, "refiner.run.output": str(output), "refiner.recipe.epochs": epochs}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def sample_log(folder: Path, **more: str) -> dict[str, str]:
    """The environment of ranks that log to ``folder`` which samples each step is made of; see poison/."""
    paths = f"{Path(__file__).with_name('poison')}:{ROOT}"
    folder.mkdir(parents=True, exist_ok=True)
    return {**environment(REFINER_SAMPLES=str(folder), **more), "PYTHONPATH": paths}


@dataclass(frozen=True)
class Recovery:
    """How a run came through one event: seconds until it trained on, and optimizer steps it had to take again."""

    kind: str
    seconds: float
    steps_lost: int


class Course:
    """A run and what happens to it.

    Args:
        folder: for everything of it.
        chance: of the moments of events.
        disk: the file system that ``folder`` is on, if it is one that can be made full.
        again: seconds in which the run has to train again, whatever happened.
    """

    def __init__(self, folder: Path, chance: random.Random, disk: SmallDisk | None, again: float) -> None:
        folder.mkdir(parents=True)
        self.folder, self._chance, self._disk, self._again = folder, chance, disk, again
        self.run = RunFolder(folder / "quickstart")
        self.recoveries: list[Recovery] = []
        self.unlogged: set[int] = set()  # steps that a full disk may have had no room for
        self._poison, self._next = folder / "poison", folder / "next"
        self._log = os.memfd_create("log")  # not on the disk, which would have no room for what is waited for
        self._next.write_text(json.dumps({"ranks": 2, "arguments": []}))
        self._supervisor: subprocess.Popen[bytes] | None = None

    # -- the run -----------------------------------------------------------------------------------------------------

    @contextmanager
    def trained_by(self, launcher: str) -> Iterator[subprocess.Popen[bytes]]:
        """Train under a restarting command, which is asked to stop when the block ends.

        Args:
            launcher: "torchrun", "deepspeed" or "preloaded".
        """
        training = [preloaded.TRAIN, *arguments(self.folder, ENDLESS)]
        port = str(free_port())
        starts = {
            "torchrun": TORCHRUN,
            "deepspeed": [
                sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port,
            ],
        }.get(launcher, ["preloaded"])  # fmt: skip
        module = [preloaded.NAME, str(self._next)] if launcher == "preloaded" else ["refiner_ds.restart"]
        command = [sys.executable, "-m", *module, "--times", "100000", "--", *starts, *training]
        env = sample_log(self.folder / "samples", REFINER_POISON=f"once:{self._poison}")
        self._supervisor = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=self._log, stderr=self._log
        )
        try:
            self._wait(self._has_progressed(), f"the start of {launcher}")
            yield self._supervisor
        finally:
            if self._supervisor.poll() is None:
                self._supervisor.send_signal(signal.SIGTERM)  # the run saves, and what comes next goes on with it
                self._supervisor.wait(self._again)
            self._supervisor = None

    def finish(self) -> int:
        """Have the run of a preloaded launcher go on for a few steps, to its end; returns the number of steps."""
        assert self._supervisor is not None
        self._wait(self._has_progressed(), "progress before the end")
        steps, ranks = self.last_step() + LAST_STEPS, len(self._start()["processes"])
        ends = ["--set", f"refiner.recipe.epochs={steps / STEPS_AN_EPOCH}"]
        self._next.write_text(json.dumps({"ranks": ranks, "arguments": ends}))
        os.kill(self._launcher()[0].pid, signal.SIGTERM)
        assert self._supervisor.wait(self._again) == 0, self.log()[-4000:]
        return steps

    # -- one event ---------------------------------------------------------------------------------------------------

    def happen(self, kind: str) -> None:
        """Let something happen, and wait until the run trains again."""
        self._wait(self._has_progressed(), f"progress before {kind}")
        time.sleep(self._chance.uniform(0, 1))
        before, start, said = self.last_step(), self._start(), self.log().count("not saved: step")
        running = Running(self.run, self._launcher(), self._poison, self._next, self._disk)
        at = time.time()
        kind = {**EVENTS, **CHANGES}[kind](running, self._chance) or kind
        if kind == NAN:
            self._wait(lambda: self._newest_incident(at)["verdict"] == "transient", kind)
            wrong, taken = self._newest_incident(at), self._poison.with_name(f"{self._poison.name}.taken")
            self._wait(lambda: self._lines()[-1]["time"] > wrong["time"], kind)
            again = next(line for line in self._lines() if line["time"] > wrong["time"])
            seconds = again["time"] - float(taken.read_text())  # from the loss itself, a step before it is noticed
            self.recoveries.append(Recovery(kind, seconds, wrong["step"] - again["step"]))
        elif kind == FULL:
            self._wait(lambda: self.log().count("not saved: step") > said, kind)
            self._make_room(kind, before)
        else:
            before = max(before, self.last_step())  # what was logged while the event was prepared
            self._wait(lambda: self._start() != start and bool(self._lines_of_this_start()), kind)
            lost = before - self._start()["step"]
            self.recoveries.append(Recovery(kind, self._lines_of_this_start()[0]["time"] - at, max(0, lost)))

    def _make_room(self, kind: str, before: int) -> None:
        assert self._disk is not None
        latest, at = self.run.latest_checkpoint(), time.time()
        self._disk.resize()
        self._wait(lambda: self.run.latest_checkpoint() != latest, kind)
        seconds = time.time() - at
        self._wait(lambda: self._lines()[-1]["time"] > at, kind)
        after = next(line["step"] for line in self._lines() if line["time"] > at)
        self.unlogged |= set(range(before, after))
        self.recoveries.append(Recovery(kind, seconds, 0))

    def _has_progressed(self) -> Callable[[], bool]:
        """Whether the run has saved since it last started: what made no progress is not started again."""
        latest = self.run.latest_checkpoint()
        return lambda: bool(self._lines_of_this_start()) and self.run.latest_checkpoint() != latest

    def _launcher(self) -> list[Process]:
        assert self._supervisor is not None
        rank = Beat.read(self.run.heartbeats, 0)
        assert rank is not None
        found = [process for process in launchers(rank.pid) if process.pid != self._supervisor.pid]
        return found[::-1]  # the command itself first

    def starts(self) -> list[dict[str, Any]]:
        """Every start so far."""
        return [json.loads(line) for line in self.run.history.read_text().splitlines()]

    def _start(self) -> dict[str, Any]:
        return self.starts()[-1]

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.run.path, "train")

    def _lines_of_this_start(self) -> list[dict[str, Any]]:
        since = self._start()["time"]
        return [line for line in self._lines() if line["time"] > since]

    def last_step(self) -> int:
        """The last step that was logged."""
        return int(self._lines()[-1]["step"])

    def _newest_incident(self, since: float) -> dict[str, Any]:
        """The last step that went wrong since a moment; ValueError where there is none yet.

        Not the last of the file: a step that went wrong before, and does again when the run has gone back, keeps its
        place.
        """
        incidents = json.loads(self.run.divergence.read_text())["incidents"]
        return max((one for one in incidents if one["time"] > since), key=lambda one: one["time"])

    def _wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + self._again
        while not self._holds(true):
            ended = self._supervisor is not None and self._supervisor.poll() not in (None, 0)
            assert not ended, f"{what}: the run is over: {self.log()[-4000:]}"
            if self._supervisor is not None and self._supervisor.poll() == 0:
                return
            assert time.monotonic() < end, f"{what}: {self.log()[-4000:]}"
            time.sleep(LOOK_SECONDS)

    @staticmethod
    def _holds(true: Callable[[], bool]) -> bool:
        try:
            return true()
        except (OSError, ValueError, IndexError):
            return False  # a file that is being written

    def log(self) -> str:
        """What the run has said."""
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")
