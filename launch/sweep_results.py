"""What the runs of a sweep have reached, as lines of text and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder
from refiner_ds.sweep_table import SEED, SweepRun, last_evaluations, setting, word_of


def collect(runs: list[SweepRun], file: Path | None = None) -> str:
    """What the runs have reached, one line a run, and where they differ by seed a line with mean and deviation.

    Args:
        file: where to write the runs' lines as CSV too.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.differs))
    header = ["run", *(key.rpartition(".")[2] for key in keys), "paper", "state", "step", "top1", "ema_top1"]
    rows = [
        [run.name, *(_shown(run.differs.get(key)) for key in keys), _shown(run.paper), *_reached(run)] for run in runs
    ]
    if file is not None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        write_atomically(file, buffer.getvalue())
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *_over_seeds(runs)])


def _shown(value: Any) -> str:
    return "" if value is None else word_of(value)


def _reached(run: SweepRun) -> list[str]:
    folder = RunFolder(run.folder)
    evaluated = last_evaluations(folder)
    newest = folder.latest_checkpoint()
    state = "finished" if run.finished else "begun" if newest else "missing"
    step = str(int(newest.name.removeprefix("step_"))) if newest else ""
    found = (evaluated.get(weights) for weights in ("model", "ema"))
    return [state, step, *(f"{line['top1']:.2f}" if line else "" for line in found)]


def _over_seeds(runs: list[SweepRun]) -> list[str]:
    if not any(SEED in run.differs for run in runs):
        return []
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(setting(run), []).append(run)
    lines = ["", "EMA top-1 over seeds, finished runs: mean ± standard deviation (n)"]
    for name, members in groups.items():
        reached = [
            line["top1"]
            for run in members
            if run.finished and (line := last_evaluations(RunFolder(run.folder)).get("ema"))
        ]
        spread = f" ± {stdev(reached):.2f}" if len(reached) > 1 else ""
        figure = f"{mean(reached):.2f}{spread}" if reached else "missing"
        lines.append(f"  {name}: {figure} ({len(reached)} of {len(members)})")
    return lines
