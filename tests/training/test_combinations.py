"""What works together: a table of docs/training.md, each cell of which was trained or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.training.combinations_script import EVERY_ROW, ROWS
from tests.training.launched import ROOT, ranks

PAGE = (ROOT / "docs" / "training.md").read_text()
NEAR = {"bf16": 0.35, "fp32": 1e-3}  # of the way; test_engine.py says why
COMPILED_NEAR = {"bf16": 0.05, "fp32": 1e-4}


def trained(folder: Path, stages: list[int], rows: Collection[str]) -> dict[str, float | str]:
    script = Path(__file__).with_name("combinations_script.py")
    done = ranks(script, folder / "found.json", json.dumps(stages), json.dumps([*rows]), timeout=850, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    """Of the two stages that differ most."""
    return trained(tmp_path_factory.mktemp("combinations"), [0, 3], ROWS)


HEAD = "| | stage 0 | 1 | 2 | 3 | compiled, 0 | 1 | 2 | 3 |"


def table(found: dict[str, float | str], stages: list[int], rows: Collection[str]) -> list[list[str]]:
    """Rows of the table, its columns of some stages alone."""
    columns = [(stage, compiled) for compiled in (False, True) for stage in stages]
    return [
        [row, *(word(found[f"{row} | {stage} | {compiled}"], row, compiled) for stage, compiled in columns)]
        for row in rows
    ]


def table_of_the_page(stages: list[int], rows: Collection[str]) -> list[list[str]]:
    """The same as the page has it."""
    lines = PAGE.partition(HEAD)[2].splitlines()[2 : 2 + len(EVERY_ROW)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == [*EVERY_ROW]
    return [
        [row[0], *(row[1 + 4 * compiled + stage] for compiled in (0, 1) for stage in stages)]
        for row in cells
        if row[0] in rows
    ]


def word(outcome: float | str, row: str, compiled: bool) -> str:
    if isinstance(outcome, str):
        return "refused"
    near = (COMPILED_NEAR if compiled else NEAR)["bf16" if "bf16" in row else "fp32"]
    return "yes" if outcome < near else f"no: {outcome:.1g} off"


@pytest.mark.timeout(600)
def test_the_table_of_the_page_is_what_became_of_each_cell(found: dict[str, float | str]) -> None:
    assert table(found, [0, 3], ROWS) == table_of_the_page([0, 3], ROWS)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_table_of_the_page_is_what_became_of_each_cell(tmp_path: Path) -> None:
    stages = list(range(4))
    found = trained(tmp_path, stages, EVERY_ROW)
    assert table(found, stages, EVERY_ROW) == table_of_the_page(stages, EVERY_ROW)


def test_what_is_compiled_was_compiled(found: dict[str, float | str]) -> None:
    models = len(ROWS) - 2  # DeepSpeed's recomputation is refused, and accumulating in fp32 is no other model
    assert found["graphs"] >= models  # type: ignore[operator]


def test_what_does_not_work_is_refused_in_one_sentence_with_what_does(found: dict[str, float | str]) -> None:
    refusals = {outcome for outcome in found.values() if isinstance(outcome, str)}
    keys = ("refiner.model.compile", "activation_checkpointing", "data_types.grad_accum_dtype")
    for refusal in refusals:
        assert "\n" not in refusal and "; it must be " in refusal
        assert refusal.split(": ")[1].split(" is ")[0] in keys, refusal
    assert {refusal.split(": ")[1].split(" is ")[0] for refusal in refusals} == set(keys)
