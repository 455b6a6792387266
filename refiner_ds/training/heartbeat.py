"""What a rank does now, for those who wonder whether it still does anything.

    heartbeats/rank_00003.json    {"rank": 3, "host": …, "pid": …, "beats": 812, "step": 40, "doing": "forward", …}

The loop beats whenever it begins something; that costs one small object. A thread (watchdog.py) writes the file. All
ranks run the same program, so the one with the fewest beats is the one the others wait for.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

FIRST_STEPS = 2  # they compile, autotune, fill caches and wait for the loader's workers to start
# With torch.compile the step is compiled again as long as a side of mix-token's box has had but one value.
FIRST_COMPILED_STEPS = 20
REMEMBERED_STEPS = 8


@dataclass(frozen=True)
class Beat:
    """A rank as its file tells it.

    Attributes:
        machine, began: tell the process from others of its number, as in run_lock.py.
        beats: things this rank has begun since its start.
        step: optimizer step it is in; ``doing`` what.
        alive: counts up as long as the process runs, whatever its main thread does.
        patient: whether what it does may take long without anything being wrong.
    """

    rank: int
    host: str
    pid: int
    machine: str
    began: str
    beats: int
    step: int
    doing: str
    alive: int
    patient: bool = False

    def write(self, folder: Path) -> None:
        """Put it where the others look; whole, but not forced to the disk: the next one comes in seconds."""
        file = self.file(folder, self.rank)
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self)))
        os.replace(beside, file)

    @staticmethod
    def file(folder: Path, rank: int) -> Path:
        """The file of one rank."""
        return folder / f"rank_{rank:05d}.json"

    @staticmethod
    def read(folder: Path, rank: int) -> Beat | None:
        """What a rank last wrote; None where it has written nothing."""
        with suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads(Beat.file(folder, rank).read_text()))
        return None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}; step {self.step}, {self.doing})"


class Doing(NamedTuple):
    """What a process does at a moment: one object, so that another thread never sees half of a change.

    Attributes:
        beats, step, doing: as in `Beat`.
        since: when it began that, seconds of the monotonic clock.
        patient: whether that may take long without anything being wrong.
    """

    beats: int
    step: int
    doing: str
    since: float
    patient: bool


class Heartbeat:
    """What this process does, as its loop tells it.

    Args:
        first_steps: steps after a start that may take long without anything being wrong.
    Attributes:
        now: the latest; another object from beat to beat.
    """

    def __init__(self, first_steps: int = FIRST_STEPS) -> None:
        self._first_steps = first_steps
        self.now = Doing(0, 0, "starting", time.monotonic(), patient=True)
        self._steps_begun = 0
        self._elapsed = 0.0
        self._recent: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    def beat(self, step: int, doing: str, patient: bool = False) -> None:
        """Say that something begins.

        Args:
            step: optimizer step it belongs to.
            doing: what, to follow "step 40, ": "forward", "saving".
            patient: it may take minutes: a save, an evaluation, the first batch of an epoch.
        """
        since, before = time.monotonic(), self.now
        if not before.patient:
            self._elapsed += since - before.since
        if step != before.step:
            if self._elapsed:
                self._recent.append(self._elapsed)
            self._steps_begun, self._elapsed = self._steps_begun + 1, 0.0
        patient = patient or self._steps_begun <= self._first_steps
        self.now = Doing(before.beats + 1, step, doing, since, patient)

    def starts_from(self, step: int) -> None:
        """Say that the loop starts, or starts again, after ``step`` steps: the first ones that come may take long."""
        self.now = self.now._replace(step=step)
        self._steps_begun, self._elapsed = 0, 0.0

    @property
    def recent_step(self) -> float:
        """Seconds that a step has taken of late, patient things left out; 0.0 before there was one."""
        recent = list(self._recent)  # the loop appends to the other one meanwhile
        return median(recent) if recent else 0.0
