"""GLUE's tables stand in the report with intervals, published scores and what is missing; bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from refiner_ds.errors import ConfigError, DataError
from refiner_ds.glue_table import PUBLISHED, TASKS, GlueTable, read_glue_table
from refiner_ds.report.__main__ import main

from ..launch.conftest import ROOT

SCORES = {"plain": {"sst2": [80.0, 81.0, 82.0], "rte": [60.0, 62.0]}, "refined": {"sst2": [83.0, 84.2, 84.9]}}
OUTPUT = Path("runs/glue")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"label": label, "config": f"{label}.json"} for label in SCORES]
    file = tmp_path / "mine.json"
    keys = {"rows": rows, "tasks": ["sst2", "rte"], "seeds": [0, 1, 2], "baseline": "plain", "published": "bert_small"}
    file.write_text(json.dumps(keys))
    return file


def write_results(table: GlueTable, output: Path) -> None:
    for run in table.runs(output):
        scores = SCORES[run.label].get(run.task, [])
        if run.seed < len(scores):
            run.folder.mkdir(parents=True)
            found = {"score": scores[run.seed], "dev": {"dev": {"accuracy": scores[run.seed]}}}
            (run.folder / "results.json").write_text(json.dumps(found))


def line(markdown: str, first: str) -> list[str]:
    found = next(text for text in markdown.splitlines() if text.startswith(f"| {first} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_tasks_stand_beside_published_scores_and_the_baseline(table: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_results(read_glue_table(table), OUTPUT)
    assert main([str(table)]) == 0
    assert capsys.readouterr().out == "report.html and report.md: 1 table, 12 runs: 8 finished, 4 missing\n"
    written = (tmp_path / "report.md").read_text()
    assert "8 of 12 runs have finished." in written and "not the same measurement" in written
    # t(2 degrees of freedom) is 4.30265; the deviation of 80, 81, 82 is 1
    half = 4.30265 / 3**0.5
    assert line(written, "sst2")[1:5] == ["89.7", "81.00", f"{81 - half:.2f} to {81 + half:.2f}", "3 of 3"]
    assert line(written, "rte")[4:] == ["2 of 3", "–", "–", "0 of 3"]
    # of the two seeds that have both: 70 and 71.5; t of one degree of freedom is 12.7062
    half = 12.7062 * 0.75
    averages = ["75.8", "70.75", f"{70.75 - half:.2f} to {70.75 + half:.2f}", "2 of 3"]
    assert line(written, "average")[1:5] == averages
    assert line(written, "refined | sst2")[2] == "+3.03"
    assert line(written, "refined | rte")[2:] == ["–", "–", "no seed has finished in both"]
    assert "<h2>mine</h2>" in (tmp_path / "report.html").read_text()
    before = (tmp_path / "report.html").read_bytes()
    assert main([str(table)]) == 0 and (tmp_path / "report.html").read_bytes() == before


def test_the_published_average_of_each_model_is_that_of_its_tasks() -> None:
    """Its README's column "Score", which was rounded once less than the tasks' are here."""
    found = {name: mean(mean(scores[task]) for task in TASKS) for name, scores in PUBLISHED.items()}
    wanted = {"bert_tiny": 64.2, "bert_mini": 65.8, "bert_small": 71.2, "bert_medium": 73.5}
    assert found == pytest.approx(wanted, abs=0.07)


def test_the_packages_tables_can_be_read() -> None:
    files = sorted((ROOT / "ds_configs/glue/tables").glob("*.json"))
    assert files
    for file in files:
        table = read_glue_table(file)
        assert all(config.is_file() for config in table.rows.values())
        folders = [run.folder for run in table.runs(OUTPUT)]
        assert len(set(folders)) == len(folders) == len(table.rows) * len(table.tasks) * len(table.seeds)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rows": []}, "rows must be a list of at least one row"),
        ({"rows": [{"label": "a"}]}, r"rows\[0\] must say label and config"),
        ({"rows": [{"label": "a", "config": "a.json"}] * 2}, "two rows have the label a"),
        (
            {"rows": [{"label": "a", "config": "x/a.json"}, {"label": "b", "config": "y/a.json"}]},
            "two rows take a run file named a, so",
        ),
        ({"tasks": ["sst3"]}, "tasks must be a list of some of cola, sst2"),
        ({"tasks": []}, "tasks must be a list of some of"),
        ({"seeds": [0, 0]}, "seeds must be a list of whole numbers from 0, each once"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"baseline": "none"}, "baseline none is no row's label; there are plain, refined"),
        ({"published": "bert_huge"}, "published bert_huge is not known; there are bert_tiny"),
        ({"grid": {}}, "grid is not a key of a GLUE table"),
    ],
)
def test_tables_that_cannot_be(table: Path, keys: dict, said: str) -> None:
    table.write_text(json.dumps({**json.loads(table.read_text()), **keys}))
    with pytest.raises(ConfigError, match=f"mine.json: {said}"):
        read_glue_table(table)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"score": 1}', '{"score": "a", "dev": {}}', "\0\0"])
def test_results_that_cannot_be(table: Path, tmp_path: Path, text: str) -> None:
    run = read_glue_table(table).runs(tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "results.json").write_text(text)
    with pytest.raises(DataError, match="results.json: is not what a fine-tuning writes; move it away"):
        run.results()
