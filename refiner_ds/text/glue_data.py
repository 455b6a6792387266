"""Sentences and labels of a GLUE task from a folder: TSV files, or a data set of the library ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from refiner_ds.errors import DataError
from refiner_ds.text.glue_tasks import SCORES, Column, Task

__all__ = ["Samples", "read_task"]


class Samples(NamedTuple):
    """One split of a task.

    Args:
        sentences: one string or two a sample.
        labels: the number of the class, or the score.
    """

    sentences: list[tuple[str, ...]]
    labels: list[float]


def read_task(folder: Path, task: Task) -> dict[str, Samples]:
    """The training set under "train", and the development sets under their names.

    Args:
        folder: holds the task's files, or its folder; or is what ``save_to_disk`` wrote, or holds that.
    Raises:
        DataError: files or columns are missing, or a label is out of range; the sentence names file and line.
    """
    for place in (folder, folder / task.folder):
        if (place / "dataset_dict.json").is_file():
            return _from_datasets(place, task)
        if (place / "train.tsv").is_file():
            return {name: _from_tsv(place / f"{name}.tsv", task) for name in ("train", *task.dev)}
    raise DataError(
        f"{folder}: holds no {task.folder}; it must hold {task.folder}/train.tsv, or what datasets.save_to_disk wrote"
    )


def _from_tsv(file: Path, task: Task) -> Samples:
    if not file.is_file():
        raise DataError(
            f"{file}: no such file; {task.folder} has train.tsv and {', '.join(f'{x}.tsv' for x in task.dev)}"
        )
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    rows = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    header = [] if isinstance(task.label, int) else rows.pop(0)[1] if rows else []
    wanted: tuple[Column, ...] = (*task.columns, task.label)
    if missing := [str(column) for column in wanted if isinstance(column, str) and column not in header]:
        raise DataError(
            f"{file}: has no column {missing[0]!r} in its first line; {task.folder} has {', '.join(map(repr, wanted))}"
        )
    places = [column if isinstance(column, int) else header.index(column) for column in wanted]
    samples = Samples([], [])
    cut = [(number, row) for number, row in rows if len(row) <= max(places)]
    if len(cut) > task.cut_lines * len(rows):
        number, row = cut[0]
        raise DataError(f"{file}: line {number} has {len(row)} columns; it must have {max(places) + 1} or more")
    for number, row in rows:
        if len(row) <= max(places):
            continue
        *sentences, label = (row[place] for place in places)
        samples.sentences.append(tuple(sentences))
        samples.labels.append(_label(label, task, f"{file}: line {number}"))
    if not samples.labels:
        raise DataError(f"{file}: holds no sample")
    return samples


def _from_datasets(folder: Path, task: Task) -> dict[str, Samples]:
    import datasets

    try:
        splits: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # the last of a split without samples
        raise DataError(f"{folder}: cannot be read by datasets: {error}") from None
    found = {}
    for name, split in {"train": "train", **task.dev}.items():
        if split not in splits:
            raise DataError(f"{folder}: has no split {split}; there are {', '.join(splits)}")
        table = splits[split]
        if missing := [column for column in (*task.hub_columns, "label") if column not in table.column_names]:
            raise DataError(
                f"{folder}: {split} has no column {missing[0]!r}; {task.folder} has"
                f" {', '.join(map(repr, (*task.hub_columns, 'label')))}"
            )
        sentences = list(zip(*(table[column] for column in task.hub_columns), strict=True))
        for row, texts in enumerate(sentences):
            if strange := [text for text in texts if not isinstance(text, str)]:
                raise DataError(f"{folder}: {split} {row}: sentence is {strange[0]!r}; it must be text")
        labels = [_number(label, task, f"{folder}: {split} {row}") for row, label in enumerate(table["label"])]
        found[name] = Samples(sentences, labels)
    return found


def _label(text: str, task: Task, where: str) -> float:
    if task.is_regression:
        return _number(text, task, where)
    if text not in task.labels:
        raise DataError(f"{where}: label is {text!r}; it must be one of {', '.join(task.labels)}")
    return task.labels.index(text)


def _number(value: Any, task: Task, where: str) -> float:
    most = SCORES if task.is_regression else len(task.labels) - 1
    kind = "a number" if task.is_regression else "a whole number"
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = -1.0
    if not 0 <= number <= most or not (task.is_regression or number.is_integer()):
        raise DataError(f"{where}: label is {value!r}; it must be {kind} from 0 to {most:g}")
    return number if task.is_regression else int(number)
