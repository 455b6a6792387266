"""What one run folder tells a report: how far it is, what it reached, what it cost, and which code it was."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refiner_ds.config.differences import changes
from refiner_ds.errors import DataError
from refiner_ds.run_folder import RunFolder
from refiner_ds.sweep_table import SweepRun, last_evaluations

__all__ = ["RunFacts", "read_run"]

COMPARED = ("refiner.model.", "refiner.recipe.", "train_batch_size", "gradient_clipping")


@dataclass(frozen=True)
class RunFacts:
    """One run of a table.

    Attributes:
        state: "missing", "begun" or "finished".
        step: optimizer steps of the last line of its metrics.
        top1: percent, by weights, "ema" and "model"; of a finished run.
        images: images that top1 was counted on.
        hours: of training alone, without evaluations and stops; device_hours: times the processes.
        device: "cuda" or "cpu".
        commits, versions: of all its starts.
        differs: keys of model and recipe that are not the table's, with the run's value and the table's.
        losses, accuracies: (epoch, training loss) and (epoch, EMA top-1).
    """

    run: SweepRun
    state: str
    step: int = 0
    top1: dict[str, float] = field(default_factory=dict)
    images: int | None = None
    hours: float = 0.0
    device_hours: float = 0.0
    device: str = ""
    processes: int = 0
    commits: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    losses: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of everything random in it."""
        return self.run.run.refiner.run.seed


def read_run(run: SweepRun) -> RunFacts:
    """Read what there is of a run; nothing of its folder need be.

    Raises:
        DataError: a file of the folder is not what a run writes.
    """
    folder = RunFolder(run.folder)
    if not folder.history.is_file():
        return RunFacts(run, "missing")
    starts, lines = _lines(folder.history), _lines(folder.metrics)
    config = _object(folder.config)
    trained = [line for line in lines if line.get("kind") == "train"]
    accuracies = [
        (float(line["epoch"]), float(line["top1"]))
        for line in lines
        if line.get("kind") == "eval" and line.get("weights") == "ema" and line.get("top1") is not None
    ]
    losses = [(float(line["epoch"]), float(line["loss"])) for line in trained if line.get("loss") is not None]
    hours = _hours(trained)
    last = starts[-1] if starts else {}
    processes = int(last.get("world_size", 1))
    evaluated = last_evaluations(folder) if run.finished else {}
    complete = _object(folder.complete) if run.finished else {}
    return RunFacts(
        run,
        "finished" if run.finished else "begun",
        step=max((int(line["step"]) for line in trained), default=0),
        top1={which: float(line["top1"]) for which, line in sorted(evaluated.items())},
        images=complete.get("ema", {}).get("images"),
        hours=hours,
        device_hours=hours * processes,
        device=str(last.get("device", "")),
        processes=processes,
        commits=list(dict.fromkeys(str(start.get("commit", "unknown")) for start in starts)),
        versions=dict(last.get("versions", {})),
        differs={
            key: (here, table) for key, (table, here) in changes(run.run.resolved(), config) if key.startswith(COMPARED)
        },
        losses=losses,
        accuracies=accuracies,
    )


def _hours(trained: list[dict[str, Any]]) -> float:
    """Time of the optimizer steps, from the speed of each log interval."""
    seconds, before = 0.0, 0
    for line in trained:
        if line.get("images_per_second"):
            seconds += (line["samples"] - before) / line["images_per_second"]
        before = line["samples"]
    return seconds / 3600


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    with suppress(OSError):
        for text in file.read_text(errors="replace").splitlines():
            with suppress(ValueError):  # the last line of a run that was killed
                if isinstance(line := json.loads(text), dict):
                    found.append(line)
    return found


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); restore it, or move the run folder away") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: is no JSON object; restore it, or move the run folder away")
    return found
