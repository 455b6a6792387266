"""``launch/scripts``: DeepSpeed's launcher and torchrun as plain batch jobs, on two nodes of a real Slurm."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
SCRIPTS = ROOT / "launch/scripts"


def sbatch(slurm: SlurmCluster, clone: Clone, name: str, **keys: Any) -> str:
    """Submit one of the scripts for two nodes of the CPU, with a clone's code. Returns the job's number."""
    folder = clone.output.parent
    keys |= {"extends": str(ROOT / "ds_configs/quickstart.json"), "train_batch_size": 120}
    keys["refiner"] = {"run": {}} | keys.get("refiner", {})
    keys["refiner"]["run"] |= {"output": str(clone.output), "name": clone.name}
    (folder / "run.json").write_text(json.dumps(keys))
    variables = f"REFINER_DS_CACHE={clone.cache},PYTHONPATH={clone.root},PROCESSES=1,OMP_NUM_THREADS=1"
    place = (f"--chdir={folder}", f"--output={clone.output}.log", f"--export=ALL,{variables}", "--cpus-per-task=1")
    job = slurm.client("sbatch", "--parsable", "--nodes=2", *place, str(SCRIPTS / name), "--config", "run.json")
    assert job.isdigit()
    return job


def until(true: Callable[[], object], log: Path, seconds: float = 250) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def completed(slurm: SlurmCluster, job: str, log: Path) -> None:
    """The job restarted once, and ended well."""
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=200) == "COMPLETED", log.read_text()
    assert "Restarts=1" in slurm.client("scontrol", "show", "job", job)


def test_torchrun_ranks_of_two_nodes_meet_save_when_told_and_come_back(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(reduce=True, r0=["saved"], r1=["saved"])
    job, log = sbatch(slurm, clone, "torchrun.sbatch"), Path(f"{clone.output}.log")
    until(lambda: {"0.0", "1.0"} <= set(clone.seen()), log)
    slurm.client("scancel", "--batch", "--signal=USR2", job)
    completed(slurm, job, log)
    seen = clone.seen()
    assert seen.keys() == {"0.0", "1.0", "0.1", "1.1"}
    assert {(one["WORLD_SIZE"], one["sum"]) for one in seen.values()} == {("2", 2.0)}
    assert [seen[f"{rank}.1"]["host"] for rank in range(2)] == ["node1", "node2"]
    assert seen["0.0"]["MASTER_PORT"] != seen["0.1"]["MASTER_PORT"]


def test_deepspeed_trains_by_a_hostfile_without_ssh_saves_when_told_and_resumes(
    slurm: SlurmCluster, tmp_path: Path, cache: Path
) -> None:
    clone, log = Clone(ROOT, tmp_path / "runs", cache), tmp_path / "runs.log"
    small = {
        "model": {"depth": 2, "attention": "tiled"},
        "recipe": {"epochs": 1, "warmup_epochs": 0.5, "cooldown_epochs": 0},
        "run": {"log_steps": 1, "eval_epochs": 100, "picture_epochs": 100},
    }
    job = sbatch(slurm, clone, "deepspeed.sbatch", refiner=small)
    run = RunFolder(clone.run_folder)
    until(lambda: run.metrics.exists() and run.metrics.read_text(), log)
    hostfile = tmp_path / f"hostfile.{job}"
    assert hostfile.read_text() == "node1 slots=1\nnode2 slots=1\n"
    slurm.client("scancel", "--batch", "--signal=USR2", job)
    completed(slurm, job, log)
    assert not hostfile.exists()
    assert json.loads(run.complete.read_text())["step"] == 12
    assert "2 processes on CPU" in log.read_text() and re.search(r"resuming from .*step_0000", log.read_text())
    steps = [line["step"] for line in map(json.loads, run.metrics.read_text().splitlines()) if line["kind"] == "train"]
    assert steps == list(range(1, 13))
