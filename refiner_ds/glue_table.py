"""The runs of a GLUE table, and what each has reached: pure reading of files. Sweeping and reporting both read it.

    {"rows": [{"label": "plain", "config": "../bert_small.json"}, …],   run files, beside the table
     "tasks": ["cola", "sst2", …],                                      all nine unless given
     "seeds": [0, 1, 2],
     "about": "…", "baseline": "plain", "published": "bert_small"}      heading, row compared with, yardstick

table.json ─▶ rows × tasks × seeds ─▶ GlueRun: run file, task, seed, a folder that follows from them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.errors import ConfigError, DataError
from refiner_ds.files import has_numbers, read_object
from refiner_ds.shipped import or_shipped, read_given

__all__ = ["PUBLISHED", "TASKS", "GlueRun", "GlueTable", "glue_folder", "is_glue_table", "read_glue_table"]

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
RESULTS = "results.json"

# Scores on GLUE's test sets from the README of github.com/google-research/bert (section "Smaller BERT Models"):
# MRPC and QQP are F1/accuracy, STS-B Pearson/Spearman, MNLI matched/mismatched.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "bert_tiny": {
        "cola": (0.0,), "sst2": (83.2,), "mrpc": (81.1, 71.1), "stsb": (74.3, 73.6), "qqp": (62.2, 83.4),
        "mnli": (70.2, 70.3), "qnli": (81.5,), "rte": (57.2,), "wnli": (62.3,),
    },
    "bert_mini": {
        "cola": (0.0,), "sst2": (85.9,), "mrpc": (81.1, 71.8), "stsb": (75.4, 73.3), "qqp": (66.4, 86.2),
        "mnli": (74.8, 74.3), "qnli": (84.1,), "rte": (57.9,), "wnli": (62.3,),
    },
    "bert_small": {
        "cola": (27.8,), "sst2": (89.7,), "mrpc": (83.4, 76.2), "stsb": (78.8, 77.0), "qqp": (68.1, 87.0),
        "mnli": (77.6, 77.0), "qnli": (86.4,), "rte": (61.8,), "wnli": (62.3,),
    },
    "bert_medium": {
        "cola": (38.0,), "sst2": (89.6,), "mrpc": (86.6, 81.6), "stsb": (80.4, 78.4), "qqp": (69.6, 87.9),
        "mnli": (80.0, 79.1), "qnli": (87.7,), "rte": (62.2,), "wnli": (62.3,),
    },
}  # fmt: skip

KEYS = ("rows", "tasks", "seeds", "about", "baseline", "published", "name")


@dataclass(frozen=True)
class GlueRun:
    """One fine-tuning.

    Attributes:
        label: of its row.
        folder: where its results are, or will be.
    """

    label: str
    config: Path
    task: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As the folder has it."""
        return "/".join(self.folder.parts[-3:])

    def results(self) -> dict[str, Any] | None:
        """What the run found; None where it has not finished.

        Raises:
            DataError: the file is not what a run writes.
        """
        file = self.folder / RESULTS
        if not file.exists():
            return None
        found = read_object(file)
        if found and isinstance(found.get("dev"), dict) and has_numbers(found, "score"):
            return found
        raise DataError(f"{file}: is not what a fine-tuning writes; move it away, and the sweep runs it again")


@dataclass(frozen=True)
class GlueTable:
    """What a table asks for.

    Attributes:
        rows: run files by label.
        baseline: label of the row that the others are compared with; empty: none.
        published: key of PUBLISHED; empty: none.
    """

    source: str
    name: str
    about: str
    rows: dict[str, Path]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str = ""
    published: str = ""

    def runs(self, output: Path) -> list[GlueRun]:
        """Every run, row by row, task by task."""
        return [
            GlueRun(label, config, task, seed, glue_folder(output, config, task, seed))
            for label, config in self.rows.items()
            for task in self.tasks
            for seed in self.seeds
        ]


def glue_folder(output: Path, config: Path, task: str, seed: int) -> Path:
    """Where a fine-tuning's results go."""
    return output / config.stem / task / f"seed_{seed}"


def is_glue_table(file: Path) -> bool:
    """Whether a table file is of GLUE tasks rather than of image models; False where it cannot be read."""
    given = read_object(or_shipped(file, file)) or {}
    return "tasks" in given or "seeds" in given


def read_glue_table(path: Path) -> GlueTable:
    """Read a table. Raises ConfigError, naming the file and the key."""
    file = or_shipped(path, path)
    given = read_given(file, "table")
    if not isinstance(given, dict):
        raise ConfigError(f"{file}: a table must be an object with {', '.join(KEYS)}")
    for key in given.keys() - set(KEYS):
        raise ConfigError(f"{file}: {key} is not a key of a GLUE table; there are {', '.join(KEYS)}")
    rows = _rows(file, given.get("rows"))
    tasks, seeds = given.get("tasks", list(TASKS)), given.get("seeds", [0])
    if not _is_list_of(tasks, str) or not set(tasks) <= set(TASKS):
        raise ConfigError(f"{file}: tasks must be a list of some of {', '.join(TASKS)}, each once")
    if not _is_list_of(seeds, int) or min(seeds) < 0:
        raise ConfigError(f"{file}: seeds must be a list of whole numbers from 0, each once")
    baseline, published = given.get("baseline", ""), given.get("published", "")
    if baseline and baseline not in rows:
        raise ConfigError(f"{file}: baseline {baseline} is no row's label; there are {', '.join(rows)}")
    if published and published not in PUBLISHED:
        raise ConfigError(f"{file}: published {published} is not known; there are {', '.join(PUBLISHED)}")
    name, about = str(given.get("name", file.stem)), str(given.get("about", ""))
    return GlueTable(str(file), name, about, rows, tuple(tasks), tuple(seeds), str(baseline), str(published))


def _rows(file: Path, given: Any) -> dict[str, Path]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{file}: rows must be a list of at least one row")
    rows: dict[str, Path] = {}
    for number, row in enumerate(given):
        if not isinstance(row, dict) or row.keys() != {"label", "config"} or not all(map(_is_text, row.values())):
            raise ConfigError(f"{file}: rows[{number}] must say label and config, the run file beside the table")
        if row["label"] in rows:
            raise ConfigError(f"{file}: two rows have the label {row['label']}; give each its own")
        rows[row["label"]] = file.parent / row["config"]
    stems = [config.stem for config in rows.values()]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ConfigError(f"{file}: two rows take a run file named {min(twice)}, so their results would share a folder")
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list_of(given: Any, kind: type) -> bool:
    """Whether it is a list of this type, not empty, without repeats."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(one, kind) and not isinstance(one, bool) for one in given)
        and len(set(given)) == len(given)
    )
