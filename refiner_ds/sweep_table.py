"""The runs of a table, and where each of them stands: pure reading of files. Submitting and reporting both read it.

    {"config": "refiner_s.json",                                     run file of every row, beside the table
     "rows": [{"label": "plain", "set": {"refiner.model.refiner": "none"}, "paper": 78.9, "note": "…"}, …],
     "grid": {"refiner.run.seed": [0, 1, 2]},                        every row is run with every combination
     "about": "…", "name": "…", "baseline": "plain"}                 heading, folder, and what rows are compared with

table.json or --grid ─▶ rows × grid ─▶ SweepRun: run file, overrides, a name that is a function of what differs
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refiner_ds.config import RunFile, load
from refiner_ds.config.finished import is_finished
from refiner_ds.errors import ConfigError
from refiner_ds.files import has_numbers, read_objects
from refiner_ds.run_folder import RunFolder
from refiner_ds.shipped import read_given

__all__ = [
    "SEED",
    "Row",
    "SweepRun",
    "Table",
    "last_evaluations",
    "read_table",
    "setting",
    "table_from_flags",
    "word_of",
]

KEYS = {"about", "baseline", "config", "grid", "rows", "name"}
ROW_KEYS = {"label", "config", "set", "paper", "note"}
SEED = "refiner.run.seed"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its run folder; its label and a signature of ``differs``.
        differs: run-file keys in which it differs from the others' run file.
        overrides: ``key=value``, as ``--set`` takes them, output folder and name included.
        paper: top-1 in percent that the paper gives for the row.
        note: what is to be known about that value.
    """

    name: str
    label: str
    config: Path
    differs: dict[str, Any]
    overrides: list[str]
    run: RunFile
    paper: float | None = None
    note: str = ""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.run.folder

    @property
    def finished(self) -> bool:
        """Whether it has trained to the end of its schedule."""
        return is_finished(self.run)


@dataclass(frozen=True)
class Row:
    """One row of a table: its label, run file, the keys it sets, and the paper's top-1 for it with a note on it."""

    label: str
    config: Path
    keys: dict[str, Any]
    paper: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """What a sweep varies.

    Attributes:
        name: folder that its runs are put in.
        about: what it is, in a sentence or two.
        baseline: label of the row that the others are compared with; empty: none.
        grid: values of each key; every row is run with every combination.
    """

    source: str
    name: str
    rows: list[Row]
    grid: dict[str, list[Any]]
    about: str = ""
    baseline: str = ""

    def runs(self, overrides: list[str]) -> list[SweepRun]:
        """Every run of the table, each checked against the schema.

        Args:
            overrides: ``key=value`` for all of them; they have no part in names.
        Raises:
            ConfigError: a run file, a key or a value that cannot be meant, or two runs that are the same.
        """
        runs = [
            self._run(row, {**row.keys, **dict(zip(self.grid, values, strict=True))}, overrides)
            for row in self.rows
            for values in itertools.product(*self.grid.values())
        ]
        seen: set[str] = set()
        for run in runs:
            if run.name in seen:
                raise ConfigError(f"{self.source}: two runs are the same ({run.name}); take one of them out")
            seen.add(run.name)
        return runs

    def across(self, grid: list[str]) -> Table:
        """The same table, run with every combination of further keys, each ``key=v1,v2``."""
        added = _read_grid(grid)
        for key in added:
            if key in self.grid or any(key in row.keys for row in self.rows):
                raise ConfigError(f"{self.source}: sets {key} itself; leave --grid {key} out")
        return replace(self, grid={**self.grid, **added})

    def _run(self, row: Row, differs: dict[str, Any], overrides: list[str]) -> SweepRun:
        label, config = row.label, row.config
        # The signature is of what differs and of the run file's name, not its text: a run that was begun is
        # recognised after an edit, and what the edit may not change is refused by the run folder.
        known = json.dumps({"config": config.name, **differs}, sort_keys=True)
        signature = hashlib.sha256(known.encode()).hexdigest()[:8]
        parts = [label] if label else []
        parts += [f"{key.rpartition('.')[2]}-{word_of(differs[key])}" for key in self.grid]
        readable = re.sub(r"[^A-Za-z0-9_.+-]+", "-", "_".join(parts))[:80].strip("-_.") or config.stem
        sets = [f"{key}={json.dumps(value)}" for key, value in differs.items()]
        shared = load(config, overrides)
        output = Path(shared.refiner.run.output) / self.name
        name = f"{readable}_{signature}"
        sets = [*overrides, *sets, f"refiner.run.output={json.dumps(str(output))}", f"refiner.run.name={name}"]
        return SweepRun(name, label, config, differs, sets, load(config, sets), row.paper, row.note)


def word_of(value: Any) -> str:
    """A value of the run file as text."""
    return value if isinstance(value, str) else json.dumps(value)


def read_table(file: Path) -> Table:
    """Read a table. Raises ConfigError, naming the file and the key."""
    given = read_given(file, "table")
    _refuse_unknown(file, "", given, KEYS)
    rows = given.get("rows", [{}])
    grid = given.get("grid", {})
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{file}: rows must be a list of at least one row")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"{file}: grid must name keys of the run file, each with a list of values")
    read = []
    for number, row in enumerate(rows):
        _refuse_unknown(file, f"rows[{number}]", row, ROW_KEYS)
        config = row.get("config", given.get("config"))
        if not isinstance(config, str):
            raise ConfigError(f"{file}: config is missing; name the run file that the rows change")
        if not isinstance(keys := row.get("set", {}), dict):
            raise ConfigError(f"{file}: rows[{number}].set must be keys of the run file and their values")
        if twice := keys.keys() & grid.keys():
            raise ConfigError(f"{file}: rows[{number}].set and grid both set {min(twice)}; keep one")
        paper = row.get("paper")
        if paper is not None and not isinstance(paper, int | float):
            raise ConfigError(f"{file}: rows[{number}].paper must be the paper's top-1, a number in percent")
        read.append(Row(str(row.get("label", "")), file.parent / config, keys, paper, str(row.get("note", ""))))
    baseline = str(given.get("baseline", ""))
    if baseline and baseline not in [row.label for row in read]:
        raise ConfigError(f"{file}: baseline {baseline} is no row's label")
    name, about = str(given.get("name", file.stem)), str(given.get("about", ""))
    return Table(str(file), name, read, grid, about, baseline)


def _refuse_unknown(file: Path, where: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise ConfigError(f"{file}: {where or 'a table'} must be an object with {', '.join(sorted(known))}")
    for key in given:
        if key not in known:
            at = f"{where}.{key}" if where else key
            raise ConfigError(f"{file}: {at} is not a key of a table; there are {', '.join(sorted(known))}")


def table_from_flags(config: Path, grid: list[str]) -> Table:
    """A table of one row from ``--config`` and ``--grid key=v1,v2``."""
    values = _read_grid(grid)
    if not values:
        raise ConfigError("--grid is missing: a sweep without one is a single run; use launch/submit.py")
    return Table(f"--grid {' '.join(grid)}", f"{config.stem}_sweep", [Row("", config, {})], values)


def _read_grid(grid: list[str]) -> dict[str, list[Any]]:
    """The values of each key; one that parses as JSON is JSON."""
    values: dict[str, list[Any]] = {}
    for text in grid:
        key, equals, given = text.partition("=")
        if not equals or not key or not given:
            raise ConfigError(f"--grid {text}: write --grid key=value,value, e.g. --grid refiner.run.seed=0,1,2")
        if key in values:
            raise ConfigError(f"--grid {text}: {key} is given twice; list all values at once")
        values[key] = [_parsed(word) for word in given.split(",")]
    return values


def _parsed(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word


def setting(run: SweepRun) -> str:
    """What a run is among the others of its table, its seed aside: its label and the keys in which it differs."""
    words = [run.label] if run.label else []
    words += [f"{key.rpartition('.')[2]} {word_of(value)}" for key, value in run.differs.items() if key != SEED]
    return ", ".join(words) or "all"


def last_evaluations(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The last evaluation of each kind of weights, "model" and "ema", in ``metrics.jsonl``."""
    lines = [line for line in read_objects(folder.metrics) if line.get("kind") == "eval"]
    return {str(line.get("weights")): line for line in lines if has_numbers(line, "top1")}
