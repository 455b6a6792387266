"""Which of a run's classes each class of a set is: accuracies over a set mean nothing without it.

    the run's names   n01440764 n01443537 …     the order of the model's outputs
    a set's names     the same, in any order; some of them; or numbers, 0 1 10 11 … as folders sort them

Names are matched by name. A set whose names are all numbers is matched by number: to the run's own numbers where those
are numbers too, else to the position in the run's list, counted from 0. Whatever else is refused. Nothing here needs
torch.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refiner_ds.errors import DataError


@dataclass(frozen=True)
class ClassMatch:
    """A set's classes as the run numbers them.

    Attributes:
        labels: [classes of the set] int64, the run's number of each.
        note: how they were matched, in one sentence; "" where both lists are the same.
    """

    labels: np.ndarray
    note: str


def match_classes(names: Sequence[str], run_names: Sequence[str], location: str) -> ClassMatch:
    """Match the classes of a set to those of a run.

    Args:
        names: the set's classes, in the order of its labels.
        run_names: the run's classes, in the order of the model's outputs.
        location: of the set, for error messages.
    Raises:
        DataError: a class of the set is none of the run's, or numbers could mean several things.
    """
    if list(names) == list(run_names):
        return ClassMatch(np.arange(len(names)), "")
    number_of = {_one_spelling(name): number for number, name in enumerate(run_names)}
    if all(_one_spelling(name) in number_of for name in names):
        labels, how = [number_of[_one_spelling(name)] for name in names], "name"
    elif names and all(name.isdecimal() for name in names):
        labels, how = _by_number([int(name) for name in names], run_names, location), "number"
    else:
        unknown = [name for name in names if _one_spelling(name) not in number_of]
        raise DataError(
            f"{location}: {_count(len(unknown), 'class')} of {len(names)}, {unknown[0]!r} first, "
            f"{'is' if len(unknown) == 1 else 'are'} not among the {len(run_names)} that the run was trained on "
            f"({_shown(run_names)}); name them alike, or leave them out"
        )
    if len(set(labels)) != len(labels):
        again = next(label for place, label in enumerate(labels) if labels.index(label) != place)
        raise DataError(f"{location}: two of its classes are the run's {run_names[again]!r}; rename one")
    return ClassMatch(np.array(labels, dtype=np.int64), _note(labels, len(run_names), how))


def _one_spelling(name: str) -> str:
    """A name with one way to write an accent: file systems differ."""
    return unicodedata.normalize("NFC", name)


def _by_number(numbers: list[int], run_names: Sequence[str], location: str) -> list[int]:
    numeric = [name.isdecimal() for name in run_names]
    if any(numeric) and not all(numeric):
        raise DataError(f"{location}: its classes are numbers, and only some of the run's are ({_shown(run_names)})")
    if all(numeric):
        number_of = {int(name): label for label, name in enumerate(run_names)}
        unknown = [number for number in numbers if number not in number_of]
        if unknown:
            raise DataError(f"{location}: its class {unknown[0]} is none of the run's numbers ({_shown(run_names)})")
        return [number_of[number] for number in numbers]
    if max(numbers) >= len(run_names):
        from_one = min(numbers) == 1 and max(numbers) == len(run_names)
        hint = "count them from 0" if from_one else "they must be places in the run's list, counted from 0"
        raise DataError(f"{location}: its class {max(numbers)} is past the run's {len(run_names)} classes; {hint}")
    return numbers


def _note(labels: list[int], run_count: int, how: str) -> str:
    if len(labels) < run_count:
        of_run = f"{len(labels):,} of the run's {run_count:,}"
    else:
        of_run = "the run's in the same order" if labels == sorted(labels) else "the run's in another order"
    return f"its {_count(len(labels), 'class')} matched by {how} to {of_run}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'es' * (number != 1)}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
