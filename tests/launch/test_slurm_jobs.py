"""Jobs on a real Slurm: what a task is told, how a job ends, and when it begins again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

from .conftest import Clone, Done

pytestmark = pytest.mark.slurm
CPU = ("--gpus-per-node", "0")


def signal_tasks(slurm: SlurmCluster, job: str, name: str = "USR2") -> None:
    """What Slurm does shortly before a time limit: every task is signalled, the batch script is not."""
    slurm.client("scancel", f"--signal={name}", job)


def test_four_nodes_meet_and_run_the_code_that_was_submitted(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(reduce=True)
    profile = clone.output.parent / "mine.yaml"
    profile.write_text("setup: [export GREETING=hello]\nenvironment: {NCCL_SOCKET_IFNAME: ib0}\n")
    words = ("--nodes", "4", *CPU, "--wait", "--cluster", str(profile), "--set", "refiner.recipe.epochs=2")
    done = clone.submit(*words, env=slurm.env | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    seen = clone.seen()
    assert [seen[f"{rank}.0"]["host"] for rank in range(4)] == ["node1", "node2", "node3", "node4"]
    for rank in range(4):
        told = seen[f"{rank}.0"]
        assert (told["RANK"], told["WORLD_SIZE"], told["sum"]) == (str(rank), "4", 4.0)
        assert (told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"], told["CUDA_VISIBLE_DEVICES"]) == ("0", "1", "")
        assert told["MASTER_ADDR"] == "node1" and 20000 <= int(told["MASTER_PORT"]) < 30000
        assert (told["GREETING"], told["NCCL_SOCKET_IFNAME"]) == ("hello", "ib0")
        assert Path(told["code"]).is_relative_to(clone.run_folder / "code")
        assert (told["python"], told["epochs"]) == (sys.executable, 2)
    assert "rank 0 of the double" in done.stdout  # the log was shown
    assert "COMPLETED, exit code 0" in done.stdout.splitlines()[-1]


def test_two_nodes_with_two_gpus_each_get_four_tasks(clone: Clone, slurm: SlurmCluster) -> None:
    done = clone.submit("--nodes", "2", "--wait", env=slurm.env)
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    told = [clone.seen()[f"{rank}.0"] for rank in range(4)]
    assert [(one["host"], one["LOCAL_RANK"]) for one in told] == [
        *(("node1", "0"), ("node1", "1"), ("node2", "0"), ("node2", "1")),
    ]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {"0,1"}
    assert {one["LOCAL_WORLD_SIZE"] for one in told} == {"2"}


def test_a_job_runs_what_was_submitted_though_the_clone_is_edited_while_it_waits(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    blocker = slurm.client("sbatch", "--parsable", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300")
    slurm.wait(blocker, "RUNNING")
    job = job_id(clone.submit(*CPU, env=slurm.env, cwd=clone.root))  # where python -m would find the clone first
    (clone.root / "refiner_ds/train.py").write_text("raise SystemExit('this is the edited code')\n")
    (clone.root / "ds_configs/quickstart.json").write_text("{}")
    slurm.client("scancel", blocker)
    slurm.wait(job, "COMPLETED")
    assert "0.0" in clone.seen()


def test_the_first_task_to_fail_ends_the_job_with_its_exit_code(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["hang"], r1=["hang"], r2=["late"], r3=["hang"])
    done = clone.submit("--nodes", "4", *CPU, "--wait", env=slurm.env)
    assert done.returncode == 3, done.stdout + done.stderr + clone.logs()
    assert "FAILED, exit code 3, first on rank 2 (node3); log " in done.stdout
    assert done.stdout.strip().endswith("_2_log.out")
    assert set(clone.seen()) == {"0.0", "1.0", "2.0", "3.0"}


def test_a_task_ended_because_another_failed_does_not_requeue_the_job(clone: Clone, slurm: SlurmCluster) -> None:
    """The one that is ended has not begun to train, and would otherwise take the signal for a preemption."""
    clone.behave(r0=["early"], r1=["late"])
    done = clone.submit("--nodes", "2", *CPU, "--wait", env=slurm.env)
    assert "exit code 3, first on rank 1" in done.stdout, done.stdout + done.stderr + clone.logs()
    assert set(clone.seen()) == {"0.0", "1.0"}


def test_a_crash_leaves_its_traceback_in_the_log(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["raise"])
    done = clone.submit(*CPU, "--wait", env=slurm.env)
    assert done.returncode == 1
    assert "RuntimeError: the double was asked to crash" in done.stdout


def test_a_signalled_job_saves_on_every_rank_and_resumes_when_it_restarts(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    clone.behave(**{f"r{rank}": ["saved"] for rank in range(4)})
    job = job_id(clone.submit("--nodes", "4", *CPU, env=slurm.env))
    clone.wait_for("0.0", "1.0", "2.0", "3.0")
    signal_tasks(slurm, job)
    clone.wait_for("0.1", "1.1", "2.1", "3.1")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert "Restarts=1" in slurm.client("scontrol", "show", "job", job)
    assert json.loads((clone.run_folder / f"jobs/{job}_requeues.json").read_text())["requeues"] == 1


def test_a_signal_before_training_has_begun_requeues_at_once(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    clone.behave(r0=["early"], r1=["early"])
    job = job_id(clone.submit("--nodes", "2", *CPU, env=slurm.env))
    clone.wait_for("0.0", "1.0")
    signal_tasks(slurm, job)
    clone.wait_for("0.1", "1.1")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"


def test_a_time_limit_tells_the_tasks_and_the_job_goes_on(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["saved"])
    words = ("--hours", str(1 / 60), "--signal-seconds", "58")  # told two seconds in, or a little before
    done = clone.submit(*CPU, "--wait", *words, env=slurm.env)
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    assert set(clone.seen()) == {"0.0", "0.1"}


def test_a_cancelled_job_stays_cancelled_though_it_saved(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    clone.behave(r0=["saved"])
    job = job_id(clone.submit(*CPU, env=slurm.env))
    clone.wait_for("0.0")
    slurm.client("scancel", job)
    assert slurm.wait(job, "CANCELLED", "FAILED", "PENDING") == "CANCELLED"
    assert "it was cancelled" in clone.logs()
    assert set(clone.seen()) == {"0.0"}


def test_a_preempted_job_saves_and_comes_back(clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]) -> None:
    clone.behave(r0=["saved"], r1=["saved"])
    job = job_id(clone.submit("--nodes", "2", *CPU, "--partition", "low", env=slurm.env))
    clone.wait_for("0.0", "1.0")
    urgent = slurm.client("sbatch", "--parsable", "-N4", "-c4", "--output=/dev/null", "--wrap", "sleep 4")
    assert slurm.wait(urgent, "COMPLETED", "FAILED") == "COMPLETED"
    clone.wait_for("0.1", "1.1")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"


def test_a_lost_node_brings_the_job_back_on_the_others(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    clone.behave(r0=["hang"], r1=["hang"])
    job = job_id(clone.submit("--nodes", "2", *CPU, env=slurm.env))
    clone.wait_for("0.0", "1.0")
    lost = clone.seen()["1.0"]["host"]
    slurm.node_down(lost)
    try:
        clone.wait_for("0.1", "1.1", seconds=90)
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
        assert lost not in {clone.seen()[who]["host"] for who in ("0.1", "1.1")}
    finally:
        slurm.node_up(lost)


def test_waiting_can_be_left_and_the_job_goes_on(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["hang"])
    command = clone.command(*CPU, "--wait")
    env = slurm.env | {"REFINER_DS_CACHE": str(clone.cache)}
    with subprocess.Popen(command, env=env, cwd=clone.output.parent, stderr=subprocess.PIPE, text=True) as waiting:
        try:
            clone.wait_for("0.0")
            waiting.send_signal(signal.SIGINT)
            _, said = waiting.communicate(timeout=30)
        finally:
            waiting.kill()
    assert waiting.returncode == 130
    assert "goes on; scancel" in said
    assert "RUNNING" in slurm.squeue().values()
