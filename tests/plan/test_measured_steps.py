"""A plan goes by steps that runs have measured on such machines, where there are any, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refiner_ds.config import load
from refiner_ds.plan.__main__ import main
from refiner_ds.step_times import StepTime, keep_step_time, read_step_times, step_time_files
from refiner_ds.versions import code_hash

KEYS = ("refiner.model.depth=2", "refiner.model.embed_dim=48", "refiner.model.num_heads=2", "train_batch_size=64")
SETS = tuple(word for key in (*KEYS, "train_micro_batch_size_per_gpu=4") for word in ("--set", key))
RUN = load(None, list(SETS[1::2]))
ON_EIGHT = StepTime("NVIDIA H200", 1, 8, 4, 2, 10, 0.25, 0.05, code_hash(), "2026-12-01")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *words: str, gpus: int = 8) -> dict[str, Any]:
    given = [*SETS, "--set", "refiner.model.num_classes=10", "--set", "refiner.data.images=1000"]
    assert main([*given, "--gpu", "h200", "--gpus-per-node", str(gpus), "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_for_the_same_machines_takes_the_measured_step(capsys: pytest.CaptureFixture[str]) -> None:
    bound = planned(capsys)
    assert bound["step"]["basis"] == "data sheet" and bound["step"]["measured"] is None
    keep_step_time(RUN, ON_EIGHT)
    found = planned(capsys)
    assert (found["step"]["basis"], found["step"]["seconds"]) == ("measured", 0.25)
    assert found["step"]["measured"]["exact"] and found["step"]["measured"]["same_code"]
    assert found["step"]["parts"] == bound["step"]["parts"]
    assert found["cost"]["hours"] == found["cost"]["steps"] * 0.25 / 3600
    given = planned(capsys, "--step-seconds", "0.5")["step"]
    assert (given["basis"], given["seconds"], given["measured"]) == ("given", 0.5, None)
    assert main([*SETS, "--gpu", "h200", "--gpus-per-node", "8"]) == 0
    told = capsys.readouterr().out
    assert "250.0 ms measured on 8 × NVIDIA H200, 4 × 2 images each, on 2026-12-01\n" in told
    assert "20% of it waiting for data" in told and "at least" in told and "other version" not in told


def test_a_newer_measurement_of_the_same_replaces_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in (0.5, 0.125):
        keep_step_time(RUN, replace(ON_EIGHT, seconds=seconds, code="of a release before"))
    found = planned(capsys)["step"]
    assert found["seconds"] == 0.125 and not found["measured"]["same_code"]
    assert main([*SETS, "--gpu", "h200", "--gpus-per-node", "8"]) == 0
    assert "2026-12-01 by another version of this code\n" in capsys.readouterr().out


def test_a_step_on_other_numbers_of_such_gpus_is_brought_to_those_planned_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = {gpus: planned(capsys, gpus=gpus)["step"]["parts"] for gpus in (8, 4)}
    around = {gpus: parts["optimizer"] + parts["communication"] for gpus, parts in rates.items()}
    keep_step_time(RUN, ON_EIGHT)
    farther = replace(ON_EIGHT, processes=1, accumulation=16, seconds=9.0, date="2026-12-02")
    keep_step_time(RUN, farther)
    found = planned(capsys, gpus=4)["step"]
    assert not found["measured"]["exact"] and found["measured"]["processes"] == 8
    assert found["seconds"] == pytest.approx(
        2 * (0.25 - around[8]) + around[4], rel=1e-12
    )  # four micro-batches, not two
    assert main([*SETS, "--gpu", "h200", "--gpus-per-node", "4"]) == 0
    assert "(250.0 ms there; communication as of 4 processes)" in capsys.readouterr().out


def test_a_step_of_a_larger_batch_is_brought_to_the_one_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    parts = planned(capsys)["step"]["parts"]
    around = parts["optimizer"] + parts["communication"]
    keep_step_time(RUN, replace(ON_EIGHT, accumulation=4, seconds=0.5))
    found = planned(capsys)["step"]
    assert not found["measured"]["exact"]
    assert found["seconds"] == pytest.approx((0.5 - around) / 2 + around, rel=1e-12)


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "h100"),
        ("--gpu", "cpu"),
        ("--set", "refiner.model.depth=3"),
        ("--set", "refiner.model.num_classes=11"),
        ("--set", "refiner.model.checkpointing=pair"),
        ("--set", "refiner.model.attention=eager"),
        ("--set", "zero_optimization.stage=3"),
        ("--set", "bf16.enabled=false"),
        ("--set", "train_micro_batch_size_per_gpu=8"),
    ],
)
def test_a_step_of_another_device_or_other_work_is_not_taken(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    keep_step_time(RUN, ON_EIGHT)
    assert planned(capsys, *words)["step"]["basis"] != "measured"


def test_a_step_of_a_backend_forced_by_the_environment_is_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_step_time(RUN, ON_EIGHT)
    monkeypatch.setenv("REFINER_ATTENTION", "eager")
    assert planned(capsys)["step"]["basis"] == "data sheet"


def test_what_changes_no_step_finds_the_same_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    keep_step_time(RUN, ON_EIGHT)
    sets = ("refiner.recipe.lr=1e-4", "refiner.run.name=other", "refiner.run.seed=3", "refiner.recipe.epochs=7")
    assert planned(capsys, *(word for one in sets for word in ("--set", one)))["step"]["seconds"] == 0.25


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", "{}", "null", '{"seconds": 1}', '"seconds"', "0 seconds", "text for seconds", "no device"],
)
def test_a_damaged_measurement_is_none(damaged: str) -> None:
    keep_step_time(RUN, ON_EIGHT)
    (file,) = step_time_files(RUN)
    whole = json.loads(file.read_text())
    assert read_step_times(RUN) == [ON_EIGHT]
    if damaged == "0 seconds":
        damaged = json.dumps(whole | {"seconds": 0.0})
    elif damaged == "text for seconds":
        damaged = json.dumps(whole | {"seconds": "0.25"})
    elif damaged == "no device":
        damaged = json.dumps(whole | {"device": None})
    file.write_text(damaged)
    assert read_step_times(RUN) == []
    keep_step_time(RUN, ON_EIGHT)
    assert read_step_times(RUN) == [ON_EIGHT]
