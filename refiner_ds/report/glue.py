"""A GLUE table's part of a report: its rows task by task beside published scores, and beside the baseline by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from refiner_ds.glue_table import PUBLISHED, GlueRun, GlueTable
from refiner_ds.page import Heading, Part, Table, Text
from refiner_ds.report.statistics import estimate, interval_cell, mean_cell, verdict_on_difference

__all__ = ["glue_parts", "states"]

AVERAGE = "average"
ABOUT = (
    "Scores in hundredths on the development sets: Matthews correlation for CoLA, the mean of accuracy and F1 for MRPC"
    " and QQP, of Pearson and Spearman for STS-B, of matched and mismatched accuracy for MNLI, accuracy otherwise;"
    " means over seeds, 95 % intervals by Student's t. The average is of seeds that have finished every task."
)
TEST_SETS = (
    " Published scores are of GLUE's test sets, whose labels are not public: a yardstick, not the same measurement."
)

Scores = dict[int, float]  # by seed


def states(table: GlueTable, output: Path) -> dict[str, int]:
    """How many of its runs have finished, and how many have not."""
    finished = [run.results() is not None for run in table.runs(output)]
    return {"finished": sum(finished), "missing": len(finished) - sum(finished)}


def glue_parts(table: GlueTable, output: Path) -> list[Part]:
    """The parts of one table.

    Args:
        output: folder that holds the results, as the sweep was given it.
    """
    runs = table.runs(output)
    scores = {label: _by_task([run for run in runs if run.label == label], table.tasks) for label in table.rows}
    done = sum(len(seeds) for tasks in scores.values() for task, seeds in tasks.items() if task != AVERAGE)
    parts: list[Part] = [Heading(table.name)]
    if table.about:
        parts.append(Text(table.about))
    parts.append(Text(f"{done} of {len(runs)} runs have finished. {ABOUT}{TEST_SETS if table.published else ''}"))
    names = [*table.tasks, AVERAGE] if len(table.tasks) > 1 else list(table.tasks)
    header = ["task", *([f"{table.published}, published"] if table.published else [])]
    for label in table.rows:
        header += [label, "95 % interval", "n"]
    lines = []
    for name in names:
        line = [name, *([_published(table, name)] if table.published else [])]
        for label in table.rows:
            found = estimate(list(scores[label][name].values()))
            line += [mean_cell(found), interval_cell(found), f"{len(scores[label][name])} of {len(table.seeds)}"]
        lines.append(line)
    parts.append(Table(header, lines))
    if table.baseline:
        parts += _against(table, scores, names)
    return parts


def _by_task(runs: Sequence[GlueRun], tasks: Sequence[str]) -> dict[str, Scores]:
    """Scores by task and seed, and the average over all tasks of every seed that has finished them."""
    found: dict[str, Scores] = {task: {} for task in tasks}
    for run in runs:
        if (results := run.results()) is not None:
            found[run.task][run.seed] = float(results["score"])
    complete = set.intersection(*(set(seeds) for seeds in found.values()))
    average = {seed: mean(found[task][seed] for task in tasks) for seed in sorted(complete)}
    return {**found, AVERAGE: average}


def _published(table: GlueTable, name: str) -> str:
    known = PUBLISHED[table.published]
    if name != AVERAGE:
        return "/".join(f"{value:.1f}" for value in known[name])
    return f"{mean(mean(known[task]) for task in table.tasks):.1f}"


def _against(table: GlueTable, scores: dict[str, dict[str, Scores]], names: Sequence[str]) -> list[Part]:
    lines = []
    for label in table.rows:
        if label == table.baseline:
            continue
        for name in names:
            mine, base = scores[label][name], scores[table.baseline][name]
            found = estimate([mine[seed] - base[seed] for seed in mine if seed in base])
            verdict = verdict_on_difference(found, table.baseline) if found else "no seed has finished in both"
            lines.append([label, name, mean_cell(found, "+"), interval_cell(found, "+"), verdict])
    header = ("row", "task", f"score less that of {table.baseline}", "95 % interval", "verdict")
    return [Heading(f"Beside {table.baseline}, seed by seed", 3), Table(header, lines)]
