"""Runs disturbed trainings beside an undisturbed one, and tells how they came through."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import read_metrics
from tests.data.small_disk import SmallDisk
from tests.drill.course import STEPS_AN_EPOCH, Course, Recovery, arguments, sample_log
from tests.drill.events import CHANGE, EVENTS, FULL, WHILE_CHANGING
from tests.drill.preloaded import TRAIN
from tests.training.launched import ranks

WEIGHTS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
COMPARED = ("step", "loss", "lr", "grad_norm")
SMOOTHED_STEPS = 50  # of a loss curve, before it is compared with one of another number of processes
LOSS_TOLERANCE = 0.05  # of its mean over so many steps


@dataclass(frozen=True)
class Plan:
    """How many events there are.

    Attributes:
        same, changing: events while two processes train, and while their number changes; forked, see preloaded.py.
        real: events under each of torchrun and deepspeed, started anew every time.
        seconds: after which no more happens.
        again: seconds in which a run has to train again after each.
        seed: of their order and moments.
        kinds: of events that happen.
    """

    same: int
    changing: int
    real: int
    seconds: float
    again: float = 900.0
    seed: int = 0
    kinds: tuple[str, ...] = tuple(EVENTS)


class Drill:
    """One drill.

    Args:
        folder: for all runs.
        disk: the file system that it is on, if it is one that can be made full.
    """

    def __init__(self, folder: Path, plan: Plan, disk: SmallDisk | None) -> None:
        self._folder, self._plan, self._chance = folder, plan, random.Random(plan.seed)
        self._same = Course(folder / "same", self._chance, disk, plan.again)
        self._changing = Course(folder / "changing", self._chance, disk, plan.again)
        self._kinds = [kind for kind in plan.kinds if disk is not None or kind != FULL]
        self._undisturbed = RunFolder(folder / "undisturbed" / "quickstart")
        self.seconds = 0.0

    @property
    def recoveries(self) -> list[Recovery]:
        """Of both runs."""
        return self._same.recoveries + self._changing.recoveries

    @property
    def starts(self) -> int:
        """How often either run was started, the first and last starts of each part included."""
        return len(self._same.starts()) + (len(self._changing.starts()) if self.changes else 0)

    @property
    def changes(self) -> bool:
        """Whether there is a run whose number of processes changes."""
        return bool(self._plan.changing)

    def run(self) -> None:
        """Have everything happen, then train undisturbed as far."""
        began, plan, steps = time.monotonic(), self._plan, 0
        end = began + plan.seconds
        same = [self._kinds[number % len(self._kinds)] for number in range(plan.same)]
        self._chance.shuffle(same)
        changing = [CHANGE if number % 2 else self._chance.choice(WHILE_CHANGING) for number in range(plan.changing)]
        real = {name: self._chance.sample(self._kinds, plan.real) for name in ("torchrun", "deepspeed")}
        parts = [(self._changing, "preloaded", changing)] * bool(changing)
        parts += [(self._same, name, kinds) for name, kinds in real.items() if kinds]
        for course, launcher, kinds in [*parts, (self._same, "preloaded", same)]:
            with course.trained_by(launcher):
                for kind in kinds:
                    if time.monotonic() < end:
                        course.happen(kind)
                        _say(f"{len(self.recoveries)}: {launcher}: {course.recoveries[-1]}")
                if launcher == "preloaded":
                    steps = max(steps, course.finish())
        self.seconds = time.monotonic() - began
        _say(f"{len(self.recoveries)} events in {self.seconds:.0f} s; now {steps} undisturbed steps")
        done = ranks(
            TRAIN, *arguments(self._undisturbed.path.parent, steps / STEPS_AN_EPOCH),
            env=sample_log(self._undisturbed.path.parent / "samples"), timeout=3600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    # -- what came of it ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[int, int]:
        """Steps of the run on two processes, and of the one whose number of processes changes."""
        return self._same.last_step(), self._changing.last_step() if self.changes else 0

    def differences(self) -> list[str]:
        """What of the disturbed runs is not as in the undisturbed one."""
        wanted = _samples(self._undisturbed.path.parent)
        found = []
        for course in [self._same] + [self._changing] * self.changes:
            if not course.run.complete.exists():
                return [f"{course.folder.name}: it did not end"]
            last = course.last_step()
            mine, theirs = _samples(course.folder), {step: some for step, some in wanted.items() if step < last}
            if wrong := [str(step) for step in sorted({*mine, *theirs}) if mine.get(step) != theirs.get(step)]:
                found.append(f"{course.folder.name}: samples of {len(wrong)} steps, the first of them {wrong[0]}")
        if self.changes and self.loss_apart() > LOSS_TOLERANCE:
            found.append("changing: loss")
        return found + self._bits()

    def _bits(self) -> list[str]:
        """Of the run whose number of processes stayed what it was."""
        mine, wanted = (
            {line["step"]: tuple(line[key] for key in COMPARED) for line in read_metrics(run.path, "train")}
            for run in (self._same.run, self._undisturbed)
        )
        missing = wanted.keys() - mine.keys() - self._same.unlogged
        different = [step for step, numbers in mine.items() if wanted.get(step) != numbers]
        ends = [run.latest_checkpoint() for run in (self._same.run, self._undisturbed)]
        found = [name for name in WEIGHTS if len({(end / name).read_bytes() for end in ends if end}) > 1]
        return [f"same: {name}" for name in found + ["metrics.jsonl"] * bool(missing or different)]

    def loss_apart(self) -> float:
        """How far the loss of the run whose world changed is from the undisturbed one's, at most, as a share of it."""
        mine, wanted = (
            {line["step"]: line["loss"] for line in read_metrics(run.path, "train")}
            for run in (self._changing.run, self._undisturbed)
        )
        steps = sorted(mine.keys() & wanted.keys())
        windows = [steps[place : place + SMOOTHED_STEPS] for place in range(0, len(steps), SMOOTHED_STEPS)]
        means = [(fmean(mine[s] for s in window), fmean(wanted[s] for s in window)) for window in windows]
        return max(abs(here - there) / there for here, there in means)


def _samples(folder: Path) -> dict[int, list[int]]:
    """Samples of each step, counted from 0, by the last start that took it."""
    lines: list[dict[str, Any]] = []
    for file in (folder / "samples").iterdir():
        lines += [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    lines.sort(key=lambda line: line["time"])
    taken_by = {line["step"]: line["launcher"] for line in lines}  # the last
    found: dict[int, dict[tuple[int, int], list[int]]] = {}
    for line in lines:
        if line["launcher"] == taken_by[line["step"]]:
            found.setdefault(line["step"], {})[line["rank"], line["micro"]] = line["samples"]
    return {step: sorted(sum(parts.values(), [])) for step, parts in found.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
