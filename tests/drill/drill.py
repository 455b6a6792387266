"""Runs a disturbed training beside an undisturbed one, and tells how it came through."""

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
from statistics import median
from typing import Any

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.parent import Process, launchers
from tests.drill.events import EVENTS, Running
from tests.training.launched import ROOT, environment, torchrun

TRAIN = str(ROOT / "refiner_ds" / "train.py")
STEPS_AN_EPOCH, STEPS_AN_EVENT = 30, 60
LAUNCHERS = (
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29641"],
)
WEIGHTS = ("model.safetensors", "ema.safetensors")
COMPARED = ("step", "loss", "lr", "grad_norm")
AGAIN_SECONDS = 300.0  # in which a run has to train again
MODEL = {
    "depth": 2, "embed_dim": 16, "num_heads": 2, "stem_chs": [4, 4, 4], "drop": 0.1, "drop_path": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """How a run came through one event: seconds until it trained on, and optimizer steps it had to take again."""

    kind: str
    seconds: float
    steps_lost: int


class Drill:
    """One drill.

    Args:
        folder: for both runs.
        seed: of the order and moments of events.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._chance = folder, random.Random(seed)
        self.recoveries: list[Recovery] = []
        self._disturbed = RunFolder(folder / "disturbed" / "quickstart")
        self._undisturbed = RunFolder(folder / "undisturbed" / "quickstart")
        self._poison = folder / "poison"
        self._seconds = 0.0

    def run(self, kinds: list[str], events: int, minutes: float) -> None:
        """Have ``events`` of these kinds happen, in equal shares, unless ``minutes`` are over first."""
        began = time.monotonic()
        epochs = (events + 2) * STEPS_AN_EVENT / STEPS_AN_EPOCH
        undisturbed = torchrun(TRAIN, *self._arguments("undisturbed", epochs), timeout=60 * minutes)
        assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
        planned = [kinds[number % len(kinds)] for number in range(events)]
        self._chance.shuffle(planned)
        half = (events + 1) // 2
        for launcher, part in zip(LAUNCHERS, (planned[:half], planned[half:]), strict=True):
            with self._supervised(launcher, epochs) as supervisor:
                for kind in part:
                    if time.monotonic() - began < 60 * minutes and not self._disturbed.complete.exists():
                        self._happen(kind)
                if part is not planned[:half] or len(self.recoveries) == events:
                    assert supervisor.wait(600) == 0, self._log()
        self._seconds = time.monotonic() - began

    def came_through(self) -> bool:
        """Whether the disturbed run ended as the other did, bit for bit."""
        return not self.differences()

    def differences(self) -> list[str]:
        """What of the disturbed run is not as in the other."""
        found = []
        ends = [run.latest_checkpoint() for run in (self._disturbed, self._undisturbed)]
        if None in ends or not self._disturbed.complete.exists():
            return ["it did not end"]
        found += [name for name in WEIGHTS if len({(end / name).read_bytes() for end in ends if end}) > 1]
        numbers = [
            [tuple(line[key] for key in COMPARED) for line in read_metrics(run.path, "train")]
            for run in (self._disturbed, self._undisturbed)
        ]
        return found + ["metrics.jsonl"] * (numbers[0] != numbers[1])

    # -- one event ---------------------------------------------------------------------------------------------------

    def _happen(self, kind: str) -> None:
        self._wait(self._has_progressed(), "progress before the next event")
        time.sleep(self._chance.uniform(0, 1))
        before, rank = self._last_step(), self._beat()
        running = Running(self._disturbed, self._launcher(rank), self._poison)
        at = time.time()
        EVENTS[kind](running, self._chance)
        if kind == "a loss of nan on one rank":
            self._wait(lambda: not self._poison.exists(), kind)
            self._wait(lambda: self._incidents()[-1:] == ["transient"], kind)
            back = min((line["step"] for line in self._lines() if line["time"] > at), default=before)
            self.recoveries.append(Recovery(kind, time.time() - at, max(0, before - back)))
            return
        self._wait(lambda: self._beat().pid != rank.pid and bool(self._lines_of_this_start()), kind)
        first = self._lines_of_this_start()[0]
        self.recoveries.append(Recovery(kind, first["time"] - at, max(0, before - first["step"] + 1)))

    def _has_progressed(self) -> Callable[[], bool]:
        """Whether the run has saved since it last started: what made no progress is not started again."""
        latest = self._disturbed.latest_checkpoint()
        return lambda: bool(self._lines_of_this_start()) and self._disturbed.latest_checkpoint() != latest

    def _launcher(self, rank: Beat) -> list[Process]:
        found = [process for process in launchers(rank.pid) if process.name != "refiner_ds.restart"]
        return found[::-1]  # the command itself first

    def _beat(self) -> Beat:
        return Beat.read(self._disturbed.heartbeats, 0) or Beat(0, "", 0, "", "", 0, 0, "", 0)

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self._disturbed.path, "train") if self._disturbed.metrics.exists() else []

    def _lines_of_this_start(self) -> list[dict[str, Any]]:
        process = Process.at(self._beat().pid)
        if process is None:
            return []
        since = _booted() + int(process.began) / os.sysconf("SC_CLK_TCK")
        return [line for line in self._lines() if line["time"] > since]

    def _last_step(self) -> int:
        return self._lines()[-1]["step"]

    def _incidents(self) -> list[str | None]:
        file = self._disturbed.divergence
        return [entry["verdict"] for entry in json.loads(file.read_text())["incidents"]] if file.exists() else []

    def _wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + AGAIN_SECONDS
        while not self._holds(true):
            assert not self._disturbed.complete.exists(), f"{what}: the run ended before; give it more steps"
            assert time.monotonic() < end, f"{what}: {self._log()}"
            time.sleep(0.1)

    @staticmethod
    def _holds(true: Callable[[], bool]) -> bool:
        try:
            return true()
        except (OSError, ValueError, IndexError):
            return False  # a file that is being written

    # -- the run -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _supervised(self, launcher: list[str], epochs: float) -> Iterator[subprocess.Popen[bytes]]:
        arguments = self._arguments("disturbed", epochs)
        command = [sys.executable, "-m", "refiner_ds.restart", "--times", "100000", "--", *launcher, TRAIN, *arguments]
        poison = {"REFINER_POISON": f"once:{self._poison}"}
        paths = f"{Path(__file__).with_name('poison')}:{ROOT}"
        with open(self._folder / "log", "ab") as log:
            supervisor = subprocess.Popen(
                command, cwd=ROOT, env={**environment(**poison), "PYTHONPATH": paths}, start_new_session=True,
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            yield supervisor
        finally:
            if supervisor.poll() is None:
                supervisor.send_signal(signal.SIGTERM)  # the run saves, and the next part goes on with it
                supervisor.wait(AGAIN_SECONDS)

    def _arguments(self, output: str, epochs: float) -> list[str]:
        keys: dict[str, object] = {
            **{f"refiner.model.{key}": value for key, value in MODEL.items()},
            "refiner.run.output": str(self._folder / output), "refiner.recipe.epochs": epochs,
            "refiner.recipe.warmup_epochs": 0.1, "refiner.recipe.cooldown_epochs": 0, "refiner.data.workers": 1,
            "refiner.run.log_steps": 1, "refiner.run.checkpoint_epochs": 4 / STEPS_AN_EPOCH,
            "refiner.run.eval_epochs": 1000, "refiner.run.picture_epochs": 1000, "refiner.run.hang_seconds": 5,
            "refiner.run.on_divergence": "rollback", "refiner.run.rollbacks": 1000,
        }  # fmt: skip
        return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]

    def _log(self) -> str:
        return (self._folder / "log").read_text()[-4000:]

    # -- what came of it ---------------------------------------------------------------------------------------------

    def table(self) -> str:
        """Markdown: by kind, how often, seconds to training again, steps taken again, and what a person had to do."""
        lines = [
            "| event | times | seconds to training again, median (most) | steps lost, median (most) | a person did |",
            "| --- | --- | --- | --- | --- |",
        ]
        for kind in EVENTS:
            of_kind = [recovery for recovery in self.recoveries if recovery.kind == kind]
            if not of_kind:
                continue
            seconds, lost = [r.seconds for r in of_kind], [r.steps_lost for r in of_kind]
            lines.append(
                f"| {kind} | {len(of_kind)} | {median(seconds):.0f} ({max(seconds):.0f}) |"
                f" {median(lost):.0f} ({max(lost)}) | nothing |"
            )
        wrong = self.differences()
        end = f"differs in {', '.join(wrong)}" if wrong else "the same, bit for bit"
        return "\n".join(
            [*lines, "", f"{len(self.recoveries)} events in {self._seconds / 60:.0f} minutes; the end: {end}."]
        )

    def write(self, page: Path) -> None:
        """Put the table into a page, between its two marks."""
        before, _, rest = page.read_text().partition("<!-- drill -->\n")
        after = rest.partition("<!-- end of drill -->")[2]
        page.write_text(f"{before}<!-- drill -->\n{self.table()}\n<!-- end of drill -->{after}")


def _booted() -> int:
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("btime"))
