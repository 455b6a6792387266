"""The parts of a report: for every table its rows beside the paper, curves, runs and cost, and what they ran with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refiner_ds.page import Heading, Page, Part, Picture, Table, Text
from refiner_ds.report.curves import curves_svg
from refiner_ds.report.runs import RunFacts
from refiner_ds.report.statistics import (
    NOTHING,
    Estimate,
    estimate,
    interval_cell,
    mean_cell,
    verdict_on_difference,
    verdict_on_paper,
)
from refiner_ds.sweep_table import SEED, setting, word_of
from refiner_ds.sweep_table import Table as RunTable

__all__ = ["build_page"]

HEADER = ("row", "keys", "paper, top-1", "here, top-1", "95 % interval", "n", "verdict", "hours a run")
ABOUT = (
    "Top-1 in percent, of the EMA weights at the end of training, means over finished runs of different seeds."
    " Intervals are of the mean, by Student's t. Hours are of training alone, without evaluations and stops;"
    " device-hours are hours times GPUs, or times processes on CPUs. Made by python -m refiner_ds.report from run"
    " folders alone."
)


@dataclass(frozen=True)
class Row:
    """A row of a table over all its seeds."""

    name: str
    runs: list[RunFacts]

    @property
    def finished(self) -> list[RunFacts]:
        """The runs that count."""
        return [run for run in self.runs if "ema" in run.top1]

    def found(self) -> Estimate | None:
        """Mean top-1 over seeds."""
        return estimate([run.top1["ema"] for run in self.finished])


def build_page(tables: Sequence[tuple[RunTable, list[RunFacts]]], further: Sequence[Part] = ()) -> Page:
    """The report of some tables, each with all its runs in the table's order.

    Args:
        further: parts of tables of another kind, which come after these.
    """
    parts: list[Part] = [Text(ABOUT)] if tables else []
    for table, facts in tables:
        parts += _table_parts(table, facts)
    parts += further
    parts += _versions([run for _, facts in tables for run in facts])
    return Page("Runs beside the paper", parts)


def _table_parts(table: RunTable, facts: list[RunFacts]) -> list[Part]:
    named: dict[str, list[RunFacts]] = {}
    for run in facts:
        named.setdefault(_name(table, run), []).append(run)
    rows = [Row(name, runs) for name, runs in named.items()]
    done, all_runs = sum(len(row.finished) for row in rows), len(facts)
    parts: list[Part] = [Heading(table.name)]
    if table.about:
        parts.append(Text(table.about))
    parts.append(Text(f"{done} of {all_runs} runs have finished."))
    parts.append(Table(HEADER, [_row(row) for row in rows]))
    notes = [f"{row.name}: {row.runs[0].run.note}" for row in rows if row.runs[0].run.note]
    if notes:
        parts.append(Text("\n".join(notes)))
    if differing := _differing(facts):
        parts.append(Text("The runs do not have the table's keys. " + differing))
    if table.baseline:
        parts += _against(table.baseline, rows)
    parts += _curves(rows)
    if any(run.state != "missing" for run in facts):
        parts += [Heading("Runs and their cost", 3), _runs(facts)]
    return parts


def _name(table: RunTable, run: RunFacts) -> str:
    """Its label and the values of the grid, the seed aside; without a label, all in which it differs."""
    if not run.run.label:
        return setting(run.run)
    values = run.run.differs
    grid = [f"{key.rpartition('.')[2]} {word_of(values[key])}" for key in table.grid if key != SEED]
    return ", ".join([run.run.label, *grid])


def _row(row: Row) -> list[str]:
    paper, found = row.runs[0].run.paper, row.found()
    hours = [run.hours for run in row.finished]
    differs = row.runs[0].run.differs
    return [
        row.name,
        ", ".join(f"{key.rpartition('.')[2]} {word_of(value)}" for key, value in differs.items() if key != SEED),
        NOTHING if paper is None else f"{paper:g}",
        mean_cell(found),
        interval_cell(found),
        f"{len(row.finished)} of {len(row.runs)}",
        _verdict(row, paper, found),
        _duration(sum(hours) / len(hours)) if hours else NOTHING,
    ]


def _verdict(row: Row, paper: float | None, found: Estimate | None) -> str:
    if found is None:
        begun = [run for run in row.runs if run.state != "missing"]
        if not begun:
            return "not run yet"
        if any(run.state == "finished" for run in begun):
            return "finished without an evaluation"
        return "not finished: " + ", ".join(f"seed {run.seed} at step {run.step:,}" for run in begun)
    if paper is None:
        return "no value in the paper"
    if any(run.differs for run in row.finished):
        return "not to be compared with the paper: keys differ from the table's"
    return verdict_on_paper(found, paper)


def _against(baseline: str, rows: list[Row]) -> list[Part]:
    """Differences from one row, seed by seed: what seeds have in common drops out."""
    base = next((row for row in rows if row.name == baseline), None)
    by_seed = {run.seed: run.top1["ema"] for run in base.finished} if base else {}
    lines = []
    for row in rows:
        if row.name == baseline:
            continue
        both = [run.top1["ema"] - by_seed[run.seed] for run in row.finished if run.seed in by_seed]
        found = estimate(both)
        lines.append(
            [
                row.name,
                mean_cell(found, "+"),
                interval_cell(found, "+"),
                str(len(both)),
                verdict_on_difference(found, baseline) if found else "no seed has finished in both",
            ]
        )
    header = ("row", f"top-1 less that of {baseline}", "95 % interval", "n", "verdict")
    return [Heading(f"Beside {baseline}, seed by seed", 3), Table(header, lines)]


def _differing(facts: list[RunFacts]) -> str:
    seen: dict[str, list[str]] = {}
    for run in facts:
        if run.differs:
            keys = "; ".join(
                f"{key} is {word_of(here)}, in the table {word_of(table)}" for key, (here, table) in run.differs.items()
            )
            seen.setdefault(keys, []).append(run.run.name)
    started = sum(run.state != "missing" for run in facts)
    return " ".join(f"{'All' if len(runs) == started else ', '.join(runs)}: {keys}." for keys, runs in seen.items())


def _curves(rows: list[Row]) -> list[Part]:
    parts: list[Part] = []
    for caption, name, series in (
        ("Training loss over epochs, a line a run", "training loss", "losses"),
        ("Top-1 of the EMA weights over epochs, a line or a point a run", "top-1, percent,", "accuracies"),
    ):
        lines = {row.name: [getattr(run, series) for run in row.runs if getattr(run, series)] for row in rows}
        if svg := curves_svg({name: runs for name, runs in lines.items() if runs}, name):
            parts.append(Picture(caption, svg))
    return parts


def _runs(facts: list[RunFacts]) -> Table:
    header = ("run", "seed", "state", "step", "EMA top-1", "model top-1", "hours", "device-hours", "on", "commit")
    lines = []
    for run in facts:
        on = f"{run.processes} × {'GPU' if run.device == 'cuda' else run.device.upper()}" if run.device else NOTHING
        top1 = [f"{run.top1[which]:.2f}" if which in run.top1 else NOTHING for which in ("ema", "model")]
        hours = [_duration(run.hours), _duration(run.device_hours)] if run.hours else [NOTHING, NOTHING]
        step = f"{run.step:,}" if run.step else NOTHING
        commits = ", ".join(commit[:12] + ("-dirty" if commit.endswith("-dirty") else "") for commit in run.commits)
        lines.append([run.run.name, str(run.seed), run.state, step, *top1, *hours, on, commits or NOTHING])
    total = sum(run.device_hours for run in facts)
    spent = _duration(total) if total else NOTHING
    return Table(
        header, [*lines, ["all", "", "", "", "", "", _duration(sum(run.hours for run in facts)), spent, "", ""]]
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.3f}"


def _versions(facts: list[RunFacts]) -> list[Part]:
    """Exact commits and versions, each with the number of runs that had them."""
    seen: dict[tuple[str, str], int] = {}
    for run in facts:
        if run.state != "missing":
            versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
            key = (", ".join(run.commits), versions)
            seen[key] = seen.get(key, 0) + 1
    if not seen:
        return []
    lines = [[commit, versions, str(count)] for (commit, versions), count in seen.items()]
    return [Heading("Commits and versions"), Table(("commit", "versions", "runs"), lines)]
