"""The real training command as a job: the quickstart, made smaller, on Slurm and on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

# One epoch of 12 steps, two blocks deep: enough to be interrupted in, not to learn much.
SMALL = (
    *(
        "--set",
        "refiner.model.depth=2",
        "--set",
        "refiner.model.patch_size=14",
        "--set",
        "refiner.recipe.epochs=1",
        "--set",
        "refiner.recipe.warmup_epochs=0.5",
    ),
    *("--set", "refiner.recipe.cooldown_epochs=0", "--set", "refiner.run.eval_epochs=1"),
    *("--set", "refiner.run.picture_epochs=null", "--set", "refiner.run.log_steps=1", "--set", "train_batch_size=120"),
)
TWO = ("--nodes", "2", "--gpus-per-node", "0", *SMALL)


def metrics(run_folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What a run wrote down, by kind, step and weights; a step done twice keeps its last line."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"], line.get("weights", "")): line for line in lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Clone:
    """The run as two processes of this machine."""
    here = Clone(ROOT, tmp_path_factory.mktemp("undisturbed") / "runs", cache)
    done = here.submit("--local", *TWO, seconds=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return here


def test_a_local_job_trains_to_the_end_and_says_how_well(undisturbed: Clone) -> None:
    summary = json.loads((undisturbed.run_folder / "complete.json").read_text())
    assert summary["step"] == 12
    assert summary["model"]["images"] == 364  # every held-out image once, though two processes shared them
    assert 0 < summary["model"]["top1"] <= 100
    kept = sorted(file.name for file in (undisturbed.run_folder / "logs").iterdir())
    assert kept == [f"rank_{rank}.log" for rank in range(2)]
    assert list((undisturbed.run_folder / "tensorboard").iterdir())


def test_a_complete_run_is_not_submitted_again(undisturbed: Clone) -> None:
    again = undisturbed.submit("--local", *TWO)
    assert again.returncode == 2
    assert "is complete: 12 steps" in again.stderr


@pytest.mark.slurm
def test_two_nodes_interrupted_on_the_way_end_where_an_undisturbed_machine_does(
    undisturbed: Clone, slurm: SlurmCluster, tmp_path: Path
) -> None:
    there = Clone(ROOT, tmp_path / "runs", undisturbed.cache)
    env = slurm.env | {"REFINER_DS_CACHE": str(there.cache), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(there.command("--wait", *TWO), env=env, stdout=subprocess.PIPE, text=True) as waiting:
        try:
            signal_after_the_first_metrics(there, slurm)
            said, _ = waiting.communicate(timeout=280)
        finally:
            waiting.kill()
    assert waiting.returncode == 0, said
    assert said.count("Starting with JobEnvironment") == 2
    assert "resuming from" in said
    alone, together = metrics(undisturbed.run_folder), metrics(there.run_folder)
    assert together.keys() == alone.keys()
    for key, line in together.items():
        for figure in ("loss", "lr", "top1"):
            assert line.get(figure) == alone[key].get(figure), (key, figure)


def signal_after_the_first_metrics(there: Clone, slurm: SlurmCluster, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    file = there.run_folder / "metrics.jsonl"
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end, f"no metrics within {seconds:.0f} s; {there.logs()}"
        time.sleep(0.2)
    slurm.client("scancel", "--signal=USR2", "--user=root")
