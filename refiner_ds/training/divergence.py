"""When a run has left the good path, and what is done then. All ranks judge the same reduced numbers, and act alike.

    not finite     the loss or the gradient norm of a step
    a spike        either is more than `refiner.run.spike_sigmas` σ above its mean over the last steps that were fine

The first time a step goes wrong the run goes back to the last checkpoint and takes exactly the same steps again: a step
that is fine then was a fault of the hardware, which is said; one that goes wrong again is one of the data or of the
optimisation, and its samples are left out. What was left out, and the keys of the micro-batch in question on each
rank, is kept in the run folder, so that every later start leaves the same out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from refiner_ds.files import read_object, write_atomically


class SpikeDetector:
    """Judges one number a step against its own recent past.

    Args:
        sigmas: how far above the mean is too far; None: only what is not finite is.
        window: steps that are remembered; nothing is a spike before half of them have been seen.
    """

    def __init__(self, name: str, sigmas: float | None, window: int) -> None:
        self._name, self._sigmas = name, sigmas
        self._seen: deque[float] = deque(maxlen=window)

    def judge(self, value: float | None) -> str | None:
        """What is wrong with a step's value; None, and the value is remembered, where nothing is."""
        if value is None:
            return None
        if not math.isfinite(value):
            return f"the {self._name} is {value}"
        if self._sigmas is not None and 2 * len(self._seen) >= (self._seen.maxlen or 0):
            mean, deviation = fmean(self._seen), pstdev(self._seen)
            if value > mean + self._sigmas * deviation:
                far = (value - mean) / deviation if deviation else math.inf
                return f"the {self._name} is {value:.4g}, {far:.1f} σ above its last {len(self._seen)} steps"
        self._seen.append(value)
        return None


class DivergenceGuard:
    """Judges steps by their loss and gradient norm."""

    def __init__(self, sigmas: float | None, window: int) -> None:
        self._detectors = [SpikeDetector(name, sigmas, window) for name in ("loss", "gradient norm")]

    def judge(self, loss: float, grad_norm: float | None) -> str | None:
        """What is wrong with a step, in words; None where nothing is."""
        verdicts = [d.judge(value) for d, value in zip(self._detectors, (loss, grad_norm), strict=True)]
        return next((verdict for verdict in verdicts if verdict), None)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that may be to blame.

    Attributes:
        rank, micro: whose it was, and its place within the step.
        loss: its own, before any mean.
        keys: of its samples.
    """

    rank: int
    micro: int
    loss: float
    keys: list[str]


def suspects(found: list[MicroBatch]) -> list[MicroBatch]:
    """Of all micro-batches of a step, those to look at: whose loss is not finite, else the one with the highest."""
    broken = [micro for micro in found if not math.isfinite(micro.loss)]
    return broken or sorted(found, key=lambda micro: micro.loss)[-1:]


@dataclass
class Incident:
    """A step that went wrong.

    Attributes:
        step: counted from 1.
        why: what was wrong with it.
        tries: how often it has gone wrong.
        verdict: "persistent" or "transient" once it has been taken again; None before; "skipped" where it was.
        time: when it last went wrong, unix seconds.
    """

    step: int
    why: str
    tries: int = 1
    verdict: str | None = None
    suspects: list[dict[str, Any]] = field(default_factory=list)
    time: float = 0.0


class Incidents:
    """What has gone wrong in a run, kept in its folder.

    Args:
        file: <run folder>/divergence.json.
        rollbacks: how often the run may go back.
    Attributes:
        damaged: whether there is a file that cannot be read: nothing of what it said is known.
    """

    def __init__(self, file: Path, rollbacks: int) -> None:
        self._file, self._allowed = file, rollbacks
        self.rollbacks = 0
        self._incidents: dict[int, Incident] = {}
        self.damaged = False
        if file.exists():
            known = read_object(file) or {}
            try:
                self.rollbacks = int(known["rollbacks"])
                self._incidents = {int(entry["step"]): Incident(**entry) for entry in known["incidents"]}
            except (KeyError, TypeError, ValueError):
                self.rollbacks, self._incidents, self.damaged = 0, {}, True

    def put_aside(self) -> str:
        """Rename a damaged file, so that it is not written over; returns a sentence that says so."""
        aside = self._file.with_name(f"{self._file.name}.damaged")
        os.replace(self._file, aside)
        return f"{self._file}: is damaged, and is {aside.name} now; a step that went wrong before is found again"

    def left_out(self, step: int) -> bool:
        """Whether the samples of a step, counted from 1, are left out."""
        return step in self._incidents and self._incidents[step].verdict == "persistent"

    def may_go_back(self) -> bool:
        """Whether the run may go back once more."""
        return self.rollbacks < self._allowed

    def wrong(self, step: int, why: str, found: list[MicroBatch]) -> Incident:
        """Note that a step went wrong, and that the run goes back because of it."""
        incident = self._incidents.get(step)
        if incident is None or incident.verdict is not None:
            incident = self._incidents[step] = Incident(step, why)
        else:
            incident.tries += 1
            incident.verdict = "persistent"
        incident.suspects, incident.time = _written(found), time.time()
        self.rollbacks += 1
        return incident

    def skipped(self, step: int, why: str, found: list[MicroBatch]) -> None:
        """Note that a step went wrong and did not change the weights."""
        self._incidents[step] = Incident(step, why, verdict="skipped", suspects=_written(found), time=time.time())

    def fine(self, step: int) -> Incident | None:
        """Note that a step was fine; the incident where it had gone wrong before."""
        incident = self._incidents.get(step)
        if incident is None or incident.verdict is not None:
            return None
        incident.verdict = "transient"
        return incident

    def write(self) -> None:
        """Keep them for later starts; on the main process."""
        known = {"rollbacks": self.rollbacks, "incidents": [asdict(entry) for entry in self._incidents.values()]}
        write_atomically(self._file, json.dumps(known, indent=2))


def _written(found: list[MicroBatch]) -> list[dict[str, Any]]:
    return [{**asdict(micro), "loss": f"{micro.loss:.6g}"} for micro in suspects(found)]  # JSON knows no nan


def named(found: list[MicroBatch]) -> str:
    """Micro-batches in words, for a sentence: rank, place, loss and the first of their keys."""
    shown = []
    for micro in suspects(found)[:4]:
        keys = ", ".join(micro.keys[:8]) + (f" and {len(micro.keys) - 8} more" if len(micro.keys) > 8 else "")
        shown.append(f"rank {micro.rank}, micro-batch {micro.micro}, loss {micro.loss:.4g}: {keys}")
    return "; ".join(shown)
