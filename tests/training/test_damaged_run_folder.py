"""Whatever is damaged in a run folder: it is found elsewhere, or one sentence names it; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import jobs
from launch.sweep_results import collect
from refiner_ds.analysis.loading import load_model
from refiner_ds.checkpoint.files import find_checkpoint
from refiner_ds.config import load
from refiner_ds.errors import ConfigError, RefinerError
from refiner_ds.export.folder import ExportOptions, export
from refiner_ds.report.contents import build_page
from refiner_ds.report.runs import read_run
from refiner_ds.sweep_table import SweepRun, table_from_flags
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.preparation import prepare
from refiner_ds.training.watchdog import Watchdog
from tests.training.damaged_script import DAMAGES, FILES, RESUMED
from tests.training.launched import ROOT, findings

TABLE = table_from_flags(ROOT / "ds_configs" / "quickstart.json", ["refiner.run.seed=0"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return findings("damaged_script.py", tmp_path_factory.mktemp("damaged"), processes=1)


def test_a_run_resumes_though_everything_it_can_do_without_is_damaged(found: dict[str, Any]) -> None:
    assert list(found["resumed"]) == list(RESUMED)
    for damage, (code, said) in found["resumed"].items():
        assert code == 0, f"{damage}: {said}"
        assert "step_00000002 (step 2" in said and "finished: top-1" in said, f"{damage}: {said}"
        assert "divergence.json: is damaged, and is divergence.json.damaged now" in said, f"{damage}: {said}"


def test_what_stands_in_the_place_of_another_is_named_before_anything_is_written(tmp_path: Path) -> None:
    run = load(None, [f"refiner.run.output={tmp_path.parent}", f"refiner.run.name={tmp_path.name}"])
    for name in ("config.json", "history.jsonl", "attention.json", "data.json", "metrics.jsonl", "divergence.json",
                 "complete.json", "latest", "lock", "logs/rank_3.log"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=f"/{name}: is a folder where a run keeps a file; move it elsewhere"):
            prepare(run, 1)
        (tmp_path / name).rmdir()
    (tmp_path / "logs").rmdir()
    for name in ("checkpoints", "tensorboard", "logs", "heartbeats", "profiles"):
        (tmp_path / name).write_text("")
        with pytest.raises(ConfigError, match=f"/{name}: is a file where a run keeps a folder; move it elsewhere"):
            prepare(run, 1)
        (tmp_path / name).unlink()


def row_of(run: Path) -> SweepRun:
    (row,) = TABLE.runs([])
    return replace(row, run=load(None, [f"refiner.run.output={run.parent}", f"refiner.run.name={run.name}"]))


READERS: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda run: load_model(str(run)),
    "export": lambda run: export(find_checkpoint(run), ExportOptions(), run / "export"),
    "report": lambda run: build_page([(TABLE, [read_run(row_of(run))])]).html(),
    "sweep results": lambda run: collect([row_of(run)]),
    "jobs": lambda run: jobs.status(jobs.find(str(run))),
}
STEP, RESULTS = "checkpoints/step_00000002", "evaluation/step_00000002_ema"
READ = (
    *FILES[:8], "jobs/owner", "jobs/7_attempts.json", "code/7/job.json", f"{RESULTS}/val.json",
    f"{RESULTS}/calibration.json", f"{STEP}/ema.safetensors",
    *(f"{STEP}/{one}.json" for one in ("complete", "config", "data", "state", "classes")),
)  # fmt: skip


def furnish(run: Path) -> None:
    """What a submitted and evaluated run holds besides."""
    attempt = {"number": 0, "started": 1.0, "nodes": "n", "tasks": 1, "gpus": 0, "checkpoint": None, "ended": 2.0}
    figures = {"set": "val", "images": 9, "crop_ratio": 1.0, "top1": 1.0, "top1_interval": [0, 2], "top5": 2.0}
    contents = {
        "jobs/owner": "7\n", "jobs/7_attempts.json": json.dumps([attempt]), "code/7/job.json": '{"command": "x"}',
        "jobs/7_submission.sh": "", f"{RESULTS}/val.json": json.dumps(figures),
        f"{RESULTS}/calibration.json": json.dumps({**figures, "difference_interval": [0, 1]}),
    }  # fmt: skip
    for name, content in contents.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)


@pytest.mark.parametrize("name", READ)
def test_what_reads_a_run_says_in_a_sentence_what_it_cannot_do_without(
    name: str, found: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(found["run"], run)
    furnish(run)
    file, content = run / name, (run / name).read_bytes()
    for damage in [*DAMAGES, "a folder"]:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
        else:
            file.write_bytes(DAMAGES[damage](content))
        for reader, read in READERS.items():
            try:
                read(run)
            except RefinerError as error:
                case = f"{reader}, {damage}: {error}"
                assert file.name in str(error) and "\n" not in str(error), case
                assert "delete" not in str(error) and "remove" not in str(error), case
                assert name.startswith(("checkpoints/", "evaluation/")), case  # the others it can do without


@pytest.mark.parametrize("content", ["", "[]", '{"ranks": [0'])
def test_a_verdict_that_cannot_be_read_ends_the_run_all_the_same(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []

    def leave(code: int) -> None:
        left.append(code)
        watchdog._ended.set()  # the real one ends the process

    watchdog = Watchdog(Heartbeat(), tmp_path, 0, 2, 8.0, 60.0, tmp_path / "stacks", leave=leave)
    (tmp_path / "verdict.json").write_text(content)  # a full disk had room for its name
    watchdog.start()
    try:
        watchdog._thread.join(60)
    finally:
        watchdog.close()
    assert left == [75] and "the same command continues" in capsys.readouterr().err
