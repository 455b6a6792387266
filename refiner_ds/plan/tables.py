"""The plan of every run of a table (sweep_table.py), and what all of them take, before any is submitted.

Runs that differ only in their seed, name or folder are planned once.
"""

from __future__ import annotations

import json
from typing import Any

from refiner_ds.config import RunFile
from refiner_ds.errors import ConfigError
from refiner_ds.plan.checking import full_plan
from refiner_ds.plan.machines import Machines
from refiner_ds.sweep_table import Table

__all__ = ["plan_table", "table_text"]

GIB = 2**30
BASES = {
    "given": "step as given",
    "measured": "hours by measured steps",
    "data sheet": "hours: at least, at data-sheet rates",
}


def plan_table(table: Table, overrides: list[str], machines: Machines) -> dict[str, Any]:
    """One JSON object: ``source``, ``runs`` (of each ``name``, ``finished`` and ``plan``), ``cost`` of all and of those
    that are ``left``.

    Args:
        overrides: ``key=value`` for all runs.
    Raises:
        ConfigError: a run that cannot be meant, or whose batch does not divide over the processes.
    """
    plans: dict[str, dict[str, Any]] = {}
    runs = []
    for run in table.runs(overrides):
        if (kind := _what_decides(run.run)) not in plans:
            try:
                plans[kind] = full_plan(run.run, machines)
            except ConfigError as refusal:
                raise ConfigError(f"{table.source}: {run.name}: {refusal}") from None
        plan = {**plans[kind], "run": {**plans[kind]["run"], "folder": str(run.folder)}}
        runs.append({"name": run.name, "finished": run.finished, "plan": plan})
    left = [run for run in runs if not run["finished"]]
    return {"source": table.source, "runs": runs, "cost": _sum_of(runs), "left": _sum_of(left)}


def _what_decides(run: RunFile) -> str:
    """All of a run file that a plan depends on, as text."""
    keys = run.resolved()
    del keys["refiner"]["run"]
    return json.dumps(keys, sort_keys=True, default=str)


def _sum_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs, GPU-hours and money; None where one of them is unknown."""

    def total(field: str) -> float | None:
        costs = [run["plan"]["cost"][field] for run in runs]
        return None if None in costs else float(sum(costs))

    return {"runs": len(runs), "gpu_hours": total("gpu_hours"), "money": total("money")}


def table_text(planned: dict[str, Any]) -> str:
    """The same for a person: a line a run."""
    runs = planned["runs"]
    first = runs[0]["plan"]
    basis = {run["plan"]["step"]["basis"] for run in runs}
    bound = "; ".join(words for name, words in BASES.items() if name in basis)
    header = ("run", "parameters", "GiB needed", "step ms", "hours", "GPU-hours", "money")
    rows = [header, *(_cells(run) for run in runs)]
    if first["cost"]["money"] is None:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        [
            f"{planned['source']} on {first['processes']} × {first['gpu']}, {first['precision']}, {bound}",
            *("  ".join(_aligned(row, widths)).rstrip() for row in rows),
            _total("in all", planned["cost"]),
            *([_total("not finished", planned["left"])] if planned["left"] != planned["cost"] else []),
        ]
    )


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    plan = run["plan"]
    memory, cost, seconds = plan["memory"], plan["cost"], plan["step"]["seconds"]
    fits = "" if memory["fits"] else f", does not fit {memory['capacity'] / GIB:.1f}"
    return (
        run["name"] + (", finished" if run["finished"] else ""),
        f"{plan['parameters']:,}",
        f"{memory['needed'] / GIB:.1f}{fits}",
        _or_unknown(seconds and 1000 * seconds, ".1f"),
        _or_unknown(cost["hours"], ",.1f"),
        _or_unknown(cost["gpu_hours"], ",.0f"),
        _or_unknown(cost["money"], ",.2f"),
    )


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _total(which: str, cost: dict[str, Any]) -> str:
    money = "" if cost["money"] is None else f", {cost['money']:,.2f} at this price"
    runs = f"{cost['runs']} run{'' if cost['runs'] == 1 else 's'}"
    if cost["gpu_hours"] is None:
        return f"{which}: {runs}; give --step-seconds, or refiner.data.images, for hours"
    return f"{which}: {runs}, {cost['gpu_hours']:,.0f} GPU-hours{money}"
