"""A run is planned before it is submitted: what cannot fit is refused, and hours are held against the time limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import checks, planned
from launch.allocation import Allocation, on_slurm
from launch.cluster import ClusterProfile
from launch.slurm import Nodes
from refiner_ds import train
from refiner_ds.config import load
from refiner_ds.errors import LaunchError
from refiner_ds.plan import trace
from tests.slurm.cluster import SlurmCluster

from .conftest import Clone

GIB = 2**30


def allocation(tmp_path: Path, *, limit: int | None = 1440, gpu_type: str = "h200", **profile: Any) -> Allocation:
    """The quickstart on two nodes with eight GPUs each."""
    run = load(None, [f"refiner.run.output={tmp_path}", "refiner.run.name=mine"])
    return on_slurm(run, ClusterProfile(**profile), 2, Nodes("partition gpu", (8,), 96, 1000_000, gpu_type, limit))


def plan(needed: float = 60, seconds: float | None = 36.0, measured: str = "") -> dict[str, Any]:
    """What the planner answers, in the parts that are read here: 5,000 steps."""
    remedies = [{"set": "a=1", "saves": 8 * GIB, "fits": False}, {"set": "b=1", "saves": 4 * GIB, "fits": True}]
    step = {"seconds": seconds, "basis": "data sheet", "measured": None}
    if measured:
        step |= {"basis": "measured", "measured": {"date": measured}}
    memory = {"needed": needed * GIB, "capacity": 80 * GIB, "fits": needed <= 80, "remedies": remedies}
    return {"memory": memory, "step": step, "cost": {"steps": 5000}, "processes": 16, "gpu": "h200"}


def test_hours_are_held_against_the_time_limit(tmp_path: Path) -> None:
    told = planned.summary(plan(), allocation(tmp_path))
    assert told[0].startswith("plan: 60.00 of 80.00 GiB a GPU, 5,000 steps, at least 50 hours, 800 GPU-hours")
    assert told[1] == "time limit: 24 hours a job: requeued at least 2 times"
    assert "60 hours a job, one job may do" in planned.summary(plan(), allocation(tmp_path, hours=60.0))[1]
    assert "requeue: false the run stops there" in planned.summary(plan(), allocation(tmp_path, requeue=False))[1]
    assert len(planned.summary(plan(), allocation(tmp_path, limit=None))) == 1
    assert "more than the 24 that partition gpu allows" in allocation(tmp_path, hours=60.0).warnings()[-1]


def test_a_run_that_has_begun_is_reckoned_by_its_own_steps(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "step_seconds": 7.2} for step in (2000, 3000)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = planned.summary(plan(), allocation(tmp_path))[0]
    assert "2,000 steps left, 4 hours, 64 GPU-hours (at 7.2 s a step, as before)" in told


def test_a_run_that_has_not_begun_is_reckoned_by_what_others_measured_on_such_machines(tmp_path: Path) -> None:
    told = planned.summary(plan(seconds=72.0, measured="2026-12-01"), allocation(tmp_path))[0]
    assert "5,000 steps, 100 hours, 1,600 GPU-hours (at 72 s a step, as measured on 2026-12-01)" in told


def test_what_does_not_fit_is_refused_with_the_setting_that_would_make_it(tmp_path: Path) -> None:
    planned.refuse_too_large(None, allocation(tmp_path))
    planned.refuse_too_large(plan(), allocation(tmp_path))
    with pytest.raises(
        LaunchError, match=r"needs 81.00 GiB a GPU, and there are 80.00; --set b=1 saves 4.00 GiB, then"
    ):
        planned.refuse_too_large(plan(81), allocation(tmp_path))


def test_the_gpu_is_the_profiles_or_slurms(tmp_path: Path) -> None:
    assert planned.machines(allocation(tmp_path)) == {"gpu": "h200", "nodes": 2, "per_node": 8}
    named = allocation(tmp_path, gpu_type="nvidia_a100_80gb_pcie")
    assert planned.machines(named)["gpu"] == "a100-80gb-pcie"  # type: ignore[index]
    assert planned.machines(allocation(tmp_path, gpu="b200"))["gpu"] == "b200"  # type: ignore[index]
    unknown = allocation(tmp_path, gpu_type="")
    assert planned.machines(unknown) is None and "set gpu in the cluster profile" in planned.summary(None, unknown)[0]
    on_cpus = planned.machines(allocation(tmp_path, gpus_per_node=0, tasks_per_node=4, mem_gb=8.0))
    assert on_cpus == {"gpu": None, "nodes": 2, "per_node": 4, "memory_gib": 2.0}


def test_what_keeps_the_planner_from_a_plan_is_said_and_refuses_nothing(tmp_path: Path) -> None:
    broken = {"memory": {"fits": False}}  # of another version, say
    for answer, said in (
        (planned.read('ready\n{"failed": "RuntimeError: no graph"}\n'), "could not plan: RuntimeError: no graph"),
        (planned.read(json.dumps(broken)), "could not plan: KeyError: 'needed'"),
    ):
        planned.refuse_too_large(answer, allocation(tmp_path))
        assert planned.summary(answer, allocation(tmp_path)) == [said, "time limit: 24 hours a job"]


@pytest.mark.slow
def test_a_run_that_cannot_be_planned_is_ready_all_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("no such operation on fake tensors")

    monkeypatch.setattr(trace, "_loss", fails)
    monkeypatch.setenv("REFINER_DS_CACHE", str(cache))
    sets = [f"refiner.run.output={tmp_path}", "refiner.model.depth=1"]
    machines = json.dumps({"gpu": "h200", "nodes": 2, "per_node": 8})
    assert train.main(["--ready", "--plan-for", machines, *(word for key in sets for word in ("--set", key))]) == 0
    told = planned.summary(planned.read(capsys.readouterr().out), allocation(tmp_path))[0]
    assert told.startswith("could not plan: RuntimeError: no such operation on fake tensors")


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("os.kill(os.getpid(), 9)", "exit code -9"),
        ("sys.exit('error: no')", "no"),
        ("time.sleep(60)", "it had not end"),
    ],
)
def test_a_planner_that_takes_its_process_with_it_refuses_nothing(
    ending: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path))
    monkeypatch.setattr(checks, "CODE_SECONDS", 2)
    (tmp_path / "refiner_ds").mkdir()
    train = "import os, sys, time; print('F: ready; 7 images', flush=True); "
    (tmp_path / "refiner_ds/train.py").write_text(train + ending)
    assert planned.problem(checks.check_ready(allocation(tmp_path), [], tmp_path).plan).startswith(
        f"could not plan: {said}"
    )


@pytest.mark.slow
@pytest.mark.slurm
def test_a_dry_run_says_what_the_run_takes_and_a_small_node_is_refused(clone: Clone, slurm: SlurmCluster) -> None:
    clone.train_for_real()
    shallow = ("--set", "refiner.model.depth=2")
    done = clone.submit("--dry-run", "--nodes", "2", "--gpu", "h200", "--hours", "0.01", *shallow, env=slurm.env)
    assert done.returncode == 0, done.stderr
    assert "of 139.70 GiB a GPU, " in done.stderr and " GPU-hours (at h200's data-sheet rates)" in done.stderr
    assert "time limit: 0.0167 hours a job" in done.stderr and "quickstart: Slurm would start it" in done.stderr
    small = ("--dry-run", "--gpus-per-node", "0", "--mem-gb", "0.25", *shallow)
    done = clone.submit(*small, env=slurm.env)
    assert done.returncode == 2 and "GiB a process, and there are 0.25; " in done.stderr, done.stderr
    assert "--ignore-plan submits it all the same" in done.stderr.splitlines()[-1]
    done = clone.submit(*small, "--ignore-plan", env=slurm.env)
    assert done.returncode == 0 and "nothing has changed since they last passed" in done.stderr, done.stderr
