"""What one run folder tells a report: how far it is, what it reached, what it cost, and which code it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from refiner_ds.config.differences import changes
from refiner_ds.errors import DataError
from refiner_ds.files import has_numbers, read_objects
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
    starts, lines = read_objects(folder.history), read_objects(folder.metrics)
    config = folder.resolved()
    if config is None:
        raise DataError(f"{folder.config}: is damaged, and no checkpoint has a copy of it; bring back the run file")
    trained = [line for line in lines if line.get("kind") == "train" and has_numbers(line, "step", "epoch", "samples")]
    accuracies = [
        (float(line["epoch"]), float(line["top1"]))
        for line in lines
        if line.get("kind") == "eval" and line.get("weights") == "ema" and has_numbers(line, "epoch", "top1")
    ]
    losses = [(float(line["epoch"]), float(line["loss"])) for line in trained if has_numbers(line, "loss")]
    hours = _hours(trained)
    last = starts[-1] if starts else {}
    processes = int(last["world_size"]) if has_numbers(last, "world_size") else 1
    reached = folder.reached()
    evaluated = last_evaluations(folder) if reached else {}
    ema, versions = (reached or {}).get("ema"), last.get("versions")
    return RunFacts(
        run,
        "finished" if reached else "begun",
        step=max((int(line["step"]) for line in trained), default=0),
        top1={which: float(line["top1"]) for which, line in sorted(evaluated.items())},
        images=ema.get("images") if isinstance(ema, dict) else None,
        hours=hours,
        device_hours=hours * processes,
        device=str(last.get("device", "")),
        processes=processes,
        commits=list(dict.fromkeys(str(start.get("commit", "unknown")) for start in starts)),
        versions=versions if isinstance(versions, dict) else {},
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
        if has_numbers(line, "images_per_second") and line["images_per_second"]:
            seconds += (line["samples"] - before) / line["images_per_second"]
        before = line["samples"]
    return seconds / 3600
