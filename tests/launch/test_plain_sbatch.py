"""``launch/scripts``: DeepSpeed's launcher and torchrun as plain batch jobs, on two nodes of a real Slurm."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.long), "deepspeed"])
def test_ranks_of_two_nodes_meet_save_when_told_and_come_back(launcher: str, clone: Clone, slurm: SlurmCluster) -> None:
    """DeepSpeed's launcher by a hostfile, and without ssh."""
    clone.behave(reduce=True, r0=["saved"], r1=["saved"])
    folder, log = clone.output.parent, clone.output.parent / "log"
    run = {"extends": str(clone.root / "ds_configs/quickstart.json"), "refiner": {"run": {"output": str(clone.output)}}}
    (folder / "quickstart.json").write_text(json.dumps(run))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # launchers are commands of the environment
    variables = f"--export=ALL,PATH={path},PYTHONPATH={clone.root},PROCESSES=1,OMP_NUM_THREADS=1"
    flags = (f"--chdir={folder}", f"--output={log}", variables, "--nodes=2", "--cpus-per-task=1")
    script = str(ROOT / f"launch/scripts/{launcher}.sbatch")
    job = slurm.client("sbatch", "--parsable", *flags, script, "--config", "quickstart.json")
    end = time.monotonic() + 200
    while not {"0.0", "1.0"} <= set(clone.seen()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    hostfile = folder / f"hostfile.{job}"
    assert launcher == "torchrun" or hostfile.read_text() == "node1 slots=1\nnode2 slots=1\n"
    slurm.client("scancel", "--batch", "--signal=USR2", job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=250) == "COMPLETED", log.read_text()
    assert "Restarts=1" in slurm.client("scontrol", "show", "job", job) and not hostfile.exists()
    seen = clone.seen()
    assert seen.keys() == {"0.0", "1.0", "0.1", "1.1"}
    assert {(one["WORLD_SIZE"], one["sum"]) for one in seen.values()} == {("2", 2.0)}
    assert [seen[f"{rank}.1"]["host"] for rank in range(2)] == ["node1", "node2"]
    assert seen["0.0"]["MASTER_PORT"] != seen["0.1"]["MASTER_PORT"]
