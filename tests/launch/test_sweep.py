"""A table of runs: names that follow from what differs, and a command that submits only what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.sweep_results import collect
from refiner_ds.errors import ConfigError
from refiner_ds.run_folder import RunFolder
from refiner_ds.sweep_table import SweepRun, read_table, table_from_flags
from refiner_ds.training.build import build_model
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

QUICKSTART = str(ROOT / "ds_configs/quickstart.json")


def written(folder: Path, **keys: object) -> Path:
    file = folder / "mine.json"
    file.write_text(json.dumps({"config": QUICKSTART, **keys}))
    return file


def runs_of(folder: Path, **keys: object) -> list[SweepRun]:
    return read_table(written(folder, **keys)).runs([f"refiner.run.output={folder}/runs"])


def test_a_runs_name_follows_from_what_differs_and_from_nothing_else(tmp_path: Path) -> None:
    rows = [{"label": "plain", "set": {"refiner.model.refiner": "none"}}, {"label": "refined"}]
    runs = runs_of(tmp_path, rows=rows, grid={"refiner.run.seed": [0, 1]})
    assert [run.label for run in runs] == ["plain", "plain", "refined", "refined"]
    assert len({run.name for run in runs}) == 4 and runs[0].name.startswith("plain_seed-0_")
    assert all(run.folder == tmp_path / "runs/mine" / run.name for run in runs)
    assert (runs[0].run.refiner.model.refiner, runs[0].run.refiner.run.seed) == ("none", 0)
    # Other rows and seeds beside it leave a run where it is; another value does not.
    fewer = runs_of(tmp_path, rows=rows[:1], grid={"refiner.run.seed": [1, 7]})
    assert fewer[0].name == runs[1].name and fewer[1].name not in {run.name for run in runs}


def test_seeds_can_be_added_to_a_table_of_rows() -> None:
    table = read_table(ROOT / "ds_configs/paper/reduction.json")
    seeded = table.across(["refiner.run.seed=0,1"]).runs([])
    assert [(run.label, run.run.refiner.run.seed) for run in seeded] == [
        ("without", 0), ("without", 1), ("with", 0), ("with", 1)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="sets refiner.model.reduce itself"):
        table.across(["refiner.model.reduce=true,false"])


def test_flags_make_the_same_table() -> None:
    runs = table_from_flags(Path(QUICKSTART), ["refiner.recipe.lr=1e-3,2e-3", "refiner.recipe.schedule=constant"]).runs(
        []
    )
    assert [run.run.refiner.recipe.lr for run in runs] == [1e-3, 2e-3]
    assert {run.run.refiner.recipe.schedule for run in runs} == {"constant"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grids": {}}, "mine.json: grids is not a key of a table"),
        ({"rows": [{"sett": {}}]}, "rows[0].sett is not a key of a table"),
        ({"rows": []}, "rows must be a list of at least one row"),
        ({"grid": {"refiner.run.seed": 3}}, "each with a list of values"),
        ({"grid": {"refiner.run.sede": [3]}}, "refiner.run.sede is not a key; did you mean seed?"),
        ({"grid": {"refiner.run.seed": [1, 1]}}, "two runs are the same"),
        ({"rows": [{"set": {"refiner.run.seed": 1}}], "grid": {"refiner.run.seed": [1]}}, "keep one"),
        ({"config": "none.json"}, "none.json: no such run file"),
        ({"config": None}, "config is missing"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_in_one_sentence(keys: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        runs_of(tmp_path, **keys)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_is_collected_counts_finished_runs_alone_and_shows_missing_ones(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, grid={"refiner.recipe.lr": [1e-3], "refiner.run.seed": [0, 1, 2, 3]})
    for run, top1 in zip(runs[:3], (90.0, 94.0, 50.0), strict=True):
        folder = RunFolder(run.folder)
        folder.path.mkdir(parents=True)
        lines = [{"kind": "eval", "weights": "ema", "top1": 1.0}, {"kind": "train"}]
        lines += [{"kind": "eval", "weights": which, "top1": top1 - (which == "model")} for which in ("ema", "model")]
        folder.metrics.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"kind": "ev')
        folder.latest_file.write_text("step_00000120\n")
        if top1 > 60:
            folder.complete.write_text('{"step": 1}')
    assert "paper" in collect(runs).splitlines()[0]
    text = str(collect(runs, tmp_path / "table.csv"))
    shown = text.splitlines()
    assert [line.split()[3] for line in shown[1:5]] == ["finished", "finished", "begun", "missing"]
    assert shown[1].split()[4:] == ["120", "89.00", "90.00"]
    assert shown[-1].strip() == "lr 0.001: 92.00 ± 2.83 (2 of 4)"
    assert (tmp_path / "table.csv").read_text().splitlines()[1].endswith("finished,120,89.00,90.00")


RELEASED: dict[str, list[float | None]] = {  # of run files that have tests of their own
    "released": [83.6, 83.6, 84.6, 84.6, None, 84.9],
    "fine_tuned": [84.6, 85.6, 85.8, 86.0],
}
PAPER = {
    "expansion": [82.3, 82.8, 82.8, 82.9, 83.0],
    "reduction": [82.99, 82.95],
    "constraint": [83.0, 82.7, 81.7],
    "local_attention": [79.5, 81.2, 78.9, 80.3, 79.3, 80.9, 79.2, 81.1],
}


@pytest.mark.parametrize("table", RELEASED)
def test_the_released_models_stand_beside_their_published_figures(table: str) -> None:
    runs = read_table(ROOT / f"ds_configs/paper/{table}.json").runs([])
    assert [run.paper for run in runs] == RELEASED[table]


@pytest.mark.parametrize("table", PAPER)
def test_every_row_of_the_papers_tables_is_a_run_that_builds(table: str) -> None:
    runs = read_table(ROOT / f"ds_configs/paper/{table}.json").runs([])
    assert [run.paper for run in runs] == PAPER[table]
    for run in runs:
        with torch.device("meta"):
            model = build_model(run.run, 1000)
        keys = run.run.refiner.model
        assert (len(model.blocks), model.embed_dim, model.layout) == (keys.depth, keys.embed_dim, "paper")


@pytest.mark.slurm
def test_a_sweep_submits_what_is_missing_a_few_at_a_time(clone: Clone, slurm: SlurmCluster, tmp_path: Path) -> None:
    table = tmp_path / "seeds.json"
    grid = {"refiner.run.seed": [0, 1]}
    table.write_text(json.dumps({"config": str(clone.root / "ds_configs/quickstart.json"), "grid": grid}))
    output = clone.output

    def sweep(*words: str) -> str:
        command = (sys.executable, str(clone.root / "launch/sweep.py"), str(table), "--gpus-per-node", "0")
        place = ("--set", f"refiner.run.output={output}", *words)
        env = {**os.environ, **slurm.env, "REFINER_DS_CACHE": str(clone.cache)}
        done = subprocess.run([*command, *place], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    would = sweep("--dry-run")
    assert would.count("would be submitted") == 2 and not output.exists()
    jobs = [line.split() for line in sweep("--at-most", "1").splitlines()]
    numbers = [words[2].rstrip(",") for words in jobs]
    assert [words[3:] for words in jobs] == [[], ["after", "job", numbers[0]]]
    for number in numbers:
        slurm.wait(number, "COMPLETED")
    folders = [RunFolder(output / "seeds" / words[0].rstrip(":")) for words in jobs]
    starts = [(folder.path / "seen/0.0.json").stat().st_mtime for folder in folders]
    assert starts == sorted(starts)
    folders[0].complete.write_text('{"step": 1}')
    again = sweep().splitlines()
    assert again[0].endswith("finished") and len(again) == 2 and ": job " in again[1]
    slurm.wait(again[1].split()[2], "COMPLETED")
    assert "missing" in sweep("--collect")
