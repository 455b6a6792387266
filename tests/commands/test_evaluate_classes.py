"""evaluate.py knows which class is which: in other orders, in subsets and by number; other classes are refused.

One checkpoint of a few steps, and one process that evaluates it over every set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.writer import SetWriter
from tests.training.launched import ROOT, environment, ranks

WORDS = "null eins zwei drei vier fünf sechs sieben acht neun".split()
FEW_STEPS = {
    "refiner.recipe.epochs": 0.1,
    "refiner.recipe.warmup_epochs": 0,
    "refiner.recipe.cooldown_epochs": 0,
    "refiner.run.picture_epochs": None,
}

EVALUATE = """
import json, sys
from refiner_ds.evaluate import main
for words in json.load(sys.stdin):
    print("code", main(words), flush=True)
"""


def write_set(
    folder: Path, source: ShardIndex, names: list[str], kept: set[str] | None = None, backwards: bool = False
) -> Path:
    """The images of ``source`` with class n named ``names[n]``; labels as the names sort, or those ``kept`` alone."""
    chosen = sorted((name for name in names if kept is None or name in kept), reverse=backwards)
    reader = SampleReader(source)
    with SetWriter(folder, chosen, 100) as writer:
        for number in range(source.count):
            raw = reader.read(number)
            if names[raw.label] in chosen:
                writer.add(f"{number}", bytes(raw.image), "png", chosen.index(names[raw.label]))
    return folder


def write_folders(folder: Path, source: ShardIndex) -> Path:
    reader = SampleReader(source)
    for number in range(source.count):
        raw = reader.read(number)
        (folder / str(raw.label)).mkdir(parents=True, exist_ok=True)
        (folder / str(raw.label) / f"{number}.png").write_bytes(raw.image)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, dict[str, Any]]]:
    """For every set: exit code, what stderr said, and the JSON that was printed."""
    place = tmp_path_factory.mktemp("classes")
    env = environment() | {"REFINER_DS_CACHE": str(place / "cache")}
    sets = [word for key, value in FEW_STEPS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    done = ranks(ROOT / "refiner_ds" / "train.py", *sets, processes=1, cwd=place, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    val = open_index("package:digits/val", place / "cache")
    digits, many = [str(n) for n in range(10)], [f"class {n:03d}" for n in range(100)]
    data: dict[str, list[Any]] = {
        "its own": [],
        "another order": [write_set(place / "backwards", val, digits, backwards=True)],
        "leading zeros, another order": [write_set(place / "zeros", val, [f"{n:02d}" for n in range(9, -1, -1)])],
        "a subset": [write_set(place / "subset", val, digits, {"3", "7"})],
        "a subset, restricted": [place / "subset", "--restrict-classes"],
        "class folders": [write_folders(place / "folders", val)],
        "words": [write_set(place / "words", val, WORDS)],
        "a hundred classes": [write_set(place / "many", val, many)],
    }
    commands = [
        ["runs/quickstart", "--json", "--workers", "0", *(["--data", *map(str, words)] if words else [])]
        for words in data.values()
    ]
    told = subprocess.run(
        [sys.executable, "-c", EVALUATE],
        input=json.dumps(commands),
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    found: dict[str, tuple[int, str, dict[str, Any]]] = {}
    printed: dict[str, Any] = {}
    errors = iter([line for line in told.stderr.splitlines() if line.startswith("error: ")])
    names = iter(data)
    for line in told.stdout.splitlines():
        if line.startswith("{"):
            printed = json.loads(line)
        elif line.startswith("code "):
            code = int(line.removeprefix("code "))
            found[next(names)] = code, next(errors) if code else "", printed
            printed = {}
    assert list(found) == list(data)
    return found


def test_a_set_by_its_own_names_needs_no_word(answers: dict[str, tuple[int, str, dict[str, Any]]]) -> None:
    code, _, found = answers["its own"]
    assert code == 0 and found["images"] == 364 and found["classes"] == ""


@pytest.mark.parametrize("which", ["class folders", "another order"])
def test_class_folders_and_other_orders_count_the_same(
    answers: dict[str, tuple[int, str, dict[str, Any]]], which: str
) -> None:
    found, own = answers[which][2], answers["its own"][2]
    assert (found["right1"], found["right5"]) == (own["right1"], own["right5"])
    assert found["loss"] == pytest.approx(own["loss"], rel=1e-6)


def test_other_names_for_the_same_numbers_are_matched_by_number(
    answers: dict[str, tuple[int, str, dict[str, Any]]],
) -> None:
    """Class n's images lie under the number 9 − n here: every label is another one."""
    code, _, found = answers["leading zeros, another order"]
    assert code == 0 and found["classes"] == "its 10 classes matched by number to the run's in the same order"
    assert found["loss"] != pytest.approx(answers["its own"][2]["loss"], rel=1e-5)


def test_a_subset_is_mapped_and_restricted_where_asked(answers: dict[str, tuple[int, str, dict[str, Any]]]) -> None:
    (_, _, among_all), (_, _, among_two) = answers["a subset"], answers["a subset, restricted"]
    assert among_all["images"] == among_two["images"] == 73
    subset = "its 2 classes matched by name to 2 of the run's 10"
    assert among_all["classes"] == f"{subset}; guesses are among all the run's classes"
    assert among_two["classes"] == f"{subset}; guesses are among these alone"
    assert among_two["right5"] == 73 >= among_two["right1"] >= among_all["right1"]
    assert among_two["loss"] < among_all["loss"]


def test_sets_of_other_classes_are_refused_in_one_sentence(answers: dict[str, tuple[int, str, dict[str, Any]]]) -> None:
    code, error, _ = answers["words"]
    assert code == 2 and "10 classes of 10, 'acht' first, are not among the 10 that the run was trained on" in error
    code, error, _ = answers["a hundred classes"]
    assert code == 2 and "100 classes of 100, 'class 000' first, are not among the 10" in error
