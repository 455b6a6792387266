"""A table of runs is planned as a whole: every row, what all cost, and what is left of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from refiner_ds.plan import tables
from refiner_ds.plan.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = {
    f"refiner.model.{key}": value
    for key, value in {"depth": 2, "embed_dim": 16, "num_heads": 2, "attention": "eager"}.items()
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"label": "plain", "set": {**SMALL, "refiner.model.refiner": "none"}}, {"label": "refined", "set": SMALL}]
    file = tmp_path / "mine.json"
    config = str(ROOT / "ds_configs/quickstart.json")
    file.write_text(json.dumps({"config": config, "rows": rows, "grid": {"refiner.run.seed": [0, 1, 2]}}))
    return file


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_table_is_planned_row_by_row_and_once_for_all_seeds(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    full_plan = tables.full_plan
    monkeypatch.setattr(tables, "full_plan", lambda run, machines: made.append(run) or full_plan(run, machines))
    words = (str(table), "--set", f"refiner.run.output={tmp_path}", "--gpu", "h100", "--price", "2")
    found = planned(capsys, *words)
    assert len(made) == 2
    runs = found["runs"]
    assert [run["name"].partition("_")[0] for run in runs] == ["plain"] * 3 + ["refined"] * 3
    assert len({run["plan"]["run"]["folder"] for run in runs}) == 6
    plain, refined = runs[0]["plan"], runs[3]["plan"]
    assert plain["parameters"] != refined["parameters"]
    hours = 3 * (plain["cost"]["gpu_hours"] + refined["cost"]["gpu_hours"])
    assert found["cost"] == {"runs": 6, "gpu_hours": pytest.approx(hours), "money": pytest.approx(2 * hours)}
    assert found["left"] == found["cost"]

    alone = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    capsys.readouterr()
    assert planned(capsys, *alone, "--gpu", "h100")["cost"]["steps"] == refined["cost"]["steps"]

    monkeypatch.setattr("refiner_ds.sweep_table.SweepRun.finished", property(lambda run: run.name == runs[0]["name"]))
    assert main(list(words)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{table} on 1 × h100, ") and said[0].endswith("hours: at least, at data-sheet rates")
    assert said[2].startswith(f"{runs[0]['name']}, finished ") and "finished" not in "".join(said[3:8])
    assert said[8].startswith("in all: 6 runs, ") and said[9].startswith("not finished: 5 runs, ")
    assert said[8].endswith(" at this price")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpus-per-node", "7"), r"mine\.json: plain_seed-0_\w+: .*train_batch_size"),
        (("--config", "ds_configs/quickstart.json"), "give a table or --config, not both"),
        (("--grid", "refiner.run.seed=1,2"), r"mine\.json: sets refiner.run.seed itself; leave --grid"),
    ],
)
def test_a_table_that_cannot_be_planned_is_refused_in_one_sentence(
    table: Path, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:

    assert main([str(table), *words]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1


def test_a_grid_without_a_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--grid", "refiner.run.seed=0,1"]) == 2
    assert "--grid goes with a table; change keys of a run file by --set" in capsys.readouterr().err
