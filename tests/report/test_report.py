"""A report says what run folders hold: missing rows stay, means have intervals, same folders give same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from refiner_ds.errors import ConfigError, DataError
from refiner_ds.report.__main__ import main
from refiner_ds.report.contents import build_page
from refiner_ds.report.runs import RunFacts, read_run
from refiner_ds.report.statistics import estimate, t95, verdict_on_difference, verdict_on_paper
from refiner_ds.sweep_table import SweepRun, Table, read_table

from ..launch.conftest import ROOT

TOP1 = {"plain": [90.0, 91.0, 92.0], "refined": [93.0, 94.2, 94.9]}


def table_file(folder: Path) -> Path:
    rows = [
        {"label": "plain", "set": {"refiner.model.refiner": "none"}, "paper": 91.5},
        {"label": "refined", "paper": 99.0, "note": "of the main table"},
        {"label": "later", "set": {"refiner.model.depth": 2}, "paper": 50.0},
    ]
    file = folder / "small.json"
    config = str(ROOT / "ds_configs/quickstart.json")
    table = {"config": config, "rows": rows, "grid": {"refiner.run.seed": [0, 1, 2]}, "baseline": "plain"}
    file.write_text(json.dumps(table))
    return file


def write_run(run: SweepRun, top1: float, finished: bool = True) -> None:
    """A run folder as training leaves it: two intervals of 100 images a second, and the last evaluation."""
    folder = run.folder
    folder.mkdir(parents=True)
    start = {"world_size": 2, "device": "cpu", "commit": "c0ffee", "versions": {"torch": "1.2"}}
    (folder / "history.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "config.json").write_text(json.dumps(run.run.resolved()))
    lines = [
        {"kind": "train", "step": step, "epoch": step / 10, "samples": step * 9000, "loss": 2 - step / 20,
         "images_per_second": 100.0}
        for step in (10, 20)
    ]  # fmt: skip
    shown = [
        {"kind": "eval", "weights": which, "epoch": 2.0, "top1": top1 - (which == "model")}
        for which in ("model", "ema")
    ]  # noqa: E501
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, *(shown if finished else [])])) + '\n{"ki')
    if finished:
        (folder / "complete.json").write_text(json.dumps({"step": 20, "ema": {"top1": top1, "images": 100}}))


def runs_of(folder: Path) -> tuple[Table, list[SweepRun]]:
    table = read_table(table_file(folder))
    return table, table.runs([f"refiner.run.output={folder}/runs"])


@pytest.fixture
def reported(tmp_path: Path) -> tuple[Table, list[RunFacts]]:
    """Three finished seeds of two rows but for one that has only begun, and a row that has not been run."""
    table, runs = runs_of(tmp_path)
    for run in runs:
        if run.label in TOP1:
            seed = run.run.refiner.run.seed
            write_run(run, TOP1[run.label][seed], finished=(run.label, seed) != ("refined", 2))
    return table, [read_run(run) for run in runs]


def cells(markdown: str, first: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_stand_beside_the_paper_with_interval_count_cost_and_verdict(
    reported: tuple[Table, list[RunFacts]],
) -> None:
    text = build_page([reported]).markdown()
    plain, refined, later = (cells(text, name)[0] for name in ("plain", "refined", "later"))
    low, high = stats.t.interval(0.95, 2, loc=91.0, scale=stats.sem(TOP1["plain"]))
    assert plain[2:6] == ["91.5", "91.00", f"{low:.2f} to {high:.2f}", "3 of 3"]
    assert plain[6] == "agrees with the paper: its value lies in the interval" and plain[7] == "0.500"
    assert refined[3] == "93.60" and refined[5] == "2 of 3" and "outside the interval" not in refined[6]
    assert later[2:] == ["50", "–", "–", "0 of 3", "not run yet", "–"]
    assert "refined: of the main table" in text
    # Two processes for half an hour each: one device-hour a finished run.
    assert cells(text, "all")[0][6:8] == ["3.000", "6.000"]
    assert "| c0ffee | torch 1.2 | 6 |" in text
    beside = cells(text, "refined")[1]
    assert beside[1] == "+3.10" and beside[3] == "2"
    assert cells(text, "later")[1][4] == "no seed has finished in both"


def test_rows_are_compared_over_the_seeds_that_both_have_finished(tmp_path: Path) -> None:
    table, runs = runs_of(tmp_path)
    for run in runs:
        if run.label in TOP1:
            seed = run.run.refiner.run.seed
            write_run(run, TOP1[run.label][seed], finished=(run.label, seed) != ("plain", 0))
    beside = cells(build_page([(table, [read_run(run) for run in runs])]).markdown(), "refined")[1]
    assert beside[1] == f"{(94.2 - 91.0 + 94.9 - 92.0) / 2:+.2f}" and beside[3] == "2"


def test_verdicts_say_no_more_than_the_interval_does() -> None:
    many, one = estimate([80.0, 80.2, 80.4]), estimate([80.0])
    assert many and one and many.interval and one.interval is None
    assert verdict_on_paper(many, 80.5).startswith("agrees")
    assert verdict_on_paper(many, 82.0) == "1.80 below the paper: its value lies outside the interval"
    assert verdict_on_paper(one, 79.0) == "1.00 above the paper, by one seed: no interval"
    for values, said in (([1.0, 1.1, 1.2], "better"), ([-1.0, -1.1, -1.2], "worse"), ([-1.0, 1.0], "no difference")):
        found = estimate(values)
        assert found and verdict_on_difference(found, "plain").startswith(said)
    assert estimate([]) is None


def test_quantiles_are_students() -> None:
    for freedom in range(1, 60):
        assert t95(freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), rel=1e-3)


def test_a_run_with_other_keys_than_the_tables_is_not_compared_with_the_paper(tmp_path: Path) -> None:
    table, runs = runs_of(tmp_path)
    write_run(runs[0], 91.5)
    config = runs[0].folder / "config.json"
    changed = json.loads(config.read_text())
    changed["refiner"]["recipe"]["epochs"] = 1.0
    config.write_text(json.dumps(changed))
    text = build_page([(table, [read_run(run) for run in runs])]).markdown()
    assert "All: refiner.recipe.epochs is 1.0, in the table 12.0." in text
    assert cells(text, "plain")[0][6] == "not to be compared with the paper: keys differ from the table's"


def test_the_same_folders_give_the_same_bytes_in_one_file_that_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = runs_of(tmp_path)
    for run in runs[:2]:
        write_run(run, 90.0 + run.run.refiner.run.seed)
    words = [str(tmp_path / "small.json"), "--runs", str(tmp_path / "runs"), "--out"]
    for place in ("one", "two"):
        assert main([*words, str(tmp_path / place / "report.html")]) == 0
    assert "1 table, 9 runs: 2 finished, 7 missing" in capsys.readouterr().out
    one, two = (
        [(tmp_path / place / name).read_bytes() for name in ("report.html", "report.md")] for place in ("one", "two")
    )  # noqa: E501
    assert one == two
    page = one[0].decode()
    assert page.count("<svg") == 2 and "src=" not in page and "<script" not in page
    assert str(tmp_path) not in page


def test_what_cannot_be_reported_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(table_file(tmp_path))
    out = tmp_path / "out" / "report.html"
    for words, said in (
        ([table, "--runs", str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "none.json")], "no such table"),
        ([table, "--out", str(tmp_path / "report.txt")], "ends in .html"),
    ):
        assert main(["--out", str(out), *words]) == 2
        assert said in capsys.readouterr().err
    _, runs = runs_of(tmp_path)
    write_run(runs[0], 90.0)
    (runs[0].folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json: is damaged.*bring back the run file"):
        read_run(runs[0])
    assert not out.parent.exists()


def test_a_baseline_is_one_of_the_rows(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    file.write_text(file.read_text().replace('"baseline": "plain"', '"baseline": "none"'))
    with pytest.raises(ConfigError, match="baseline none is no row's label"):
        read_table(file)
