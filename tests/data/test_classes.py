"""A set's classes are matched to a run's by name or by number, or refused; labels follow."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.classes import match_classes
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches
from refiner_ds.errors import DataError

SYNSETS = [f"n{number:08d}" for number in range(1000)]
DIGITS = [str(number) for number in range(10)]
WORDS = "null eins zwei drei vier fünf sechs sieben acht neun".split()
FOLDERS = sorted(map(str, range(1000)))  # as they sort: 0, 1, 10, 100, 101 …

ANOTHER_ORDER = "to the run's in another order"

MATCHED: dict[str, tuple[list[str], list[str], list[int], str]] = {
    "the same": (SYNSETS, SYNSETS, list(range(1000)), ""),
    "another order": (DIGITS[::-1], DIGITS, list(range(10))[::-1], f"its 10 classes matched by name {ANOTHER_ORDER}"),
    "a subset": (["7", "3"], DIGITS, [7, 3], "its 2 classes matched by name to 2 of the run's 10"),
    "one class": (SYNSETS[5:6], SYNSETS, [5], "its 1 class matched by name to 1 of the run's 1,000"),
    "numbered folders": (
        FOLDERS, SYNSETS, [int(name) for name in FOLDERS], f"its 1,000 classes matched by number {ANOTHER_ORDER}"
    ),
    "some numbered folders": (["10", "2"], SYNSETS, [10, 2], "its 2 classes matched by number to 2 of the run's 1,000"),
    "leading zeros": (["00", "07"], DIGITS, [0, 7], "its 2 classes matched by number to 2 of the run's 10"),
    "numbers in order": (
        DIGITS, WORDS, list(range(10)), "its 10 classes matched by number to the run's in the same order"
    ),
    "accents": (["fu\u0308nf", "acht"], WORDS, [5, 8], "its 2 classes matched by name to 2 of the run's 10"),
    "the run's own numbers": (["2", "10"], FOLDERS, [112, 2], "its 2 classes matched by name to 2 of the run's 1,000"),
}  # fmt: skip

FROM_ONE = [str(number + 1) for number in range(1000)]
REFUSED: dict[str, tuple[list[str], list[str], str]] = {
    "other names": (WORDS, DIGITS, r"set: 10 classes of 10, 'null' first, are not among the 10 .*\(0, 1, 2, …\)"),
    "one other name": ([*SYNSETS[:9], "cat"], SYNSETS, "1 class of 10, 'cat' first, is not among the 1000"),
    "counted from 1": (FROM_ONE, SYNSETS, "class 1000 is past the run's 1000 classes; count them from 0"),
    "too many": (["0", "5000"], SYNSETS, "class 5000 is past the run's 1000 classes; they must be places"),
    "numbers that the run has not": (["3", "12"], DIGITS, "class 12 is none of the run's numbers"),
    "numbers for a run that mixes": (["1", "2"], ["cat", "2"], "only some of the run's are"),
    "names for a run of numbers": (SYNSETS, FOLDERS, "'n00000000' first, are not among"),
    "a number twice": (["7", "07"], DIGITS, "two of its classes are the run's '7'"),
}


@pytest.mark.parametrize("case", MATCHED)
def test_classes_are_matched(case: str) -> None:
    names, run_names, labels, note = MATCHED[case]
    match = match_classes(names, run_names, "set")
    assert match.labels.tolist() == labels and match.note == note


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_something_else_is_refused(case: str) -> None:
    names, run_names, says = REFUSED[case]
    with pytest.raises(DataError, match=says) as told:
        match_classes(names, run_names, "set")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_are_the_runs_wherever_they_are_read(make_set: Callable[..., ShardIndex], workers: int) -> None:
    index = make_set(9)  # classes a, b, c
    run_names = ["z", "c", "a", "b"]
    match = match_classes(index.classes, run_names, "set")
    for mapped in (index.with_classes(run_names, match.labels), None):
        mapped = mapped or pickle.loads(pickle.dumps(index.with_classes(run_names, match.labels)))
        (batch,) = eval_batches(mapped, EvalSettings(8, 1.0), batch=9, rank=0, world_size=1, workers=workers)
        assert [run_names[label] for label in batch.labels_B.tolist()] == ["a", "b", "c"] * 3
    assert index.classes == ["a", "b", "c"]
