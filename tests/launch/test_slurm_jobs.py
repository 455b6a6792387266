"""Jobs on a real Slurm: what a task is told, how a job ends, and when it begins again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.attempts import Attempts, Record
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import Clone, Done, processes

pytestmark = pytest.mark.slurm
CPU = ("--gpus-per-node", "0")


def signal_tasks(slurm: SlurmCluster, job: str, name: str = "USR2") -> None:
    """What Slurm does shortly before a time limit: every task is signalled, the batch script is not."""
    slurm.client("scancel", f"--signal={name}", job)


def slow_scontrol(folder: Path, slurm: SlurmCluster) -> Path:
    """A folder whose ``scontrol`` answers a second late, and does not come to its first update in any useful time.

    Slurm ends what still runs of a job that it has requeued: with TERM at once, and with KILL after KillWait.
    """
    tool, late = folder / "slow/scontrol", folder / "slow/late"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = update ] && [ ! -e {late} ]; then touch {late}; sleep 30; fi\n'
        f'[ "$1" = update ] && sleep 1\n{shutil.which("scontrol", path=slurm.env["PATH"])} "$@"; code=$?\n'
        '[ "$1" = requeue ] && sleep 1\nexit $code\n'
    )
    tool.chmod(0o755)
    return tool.parent


def records(clone: Clone, job: str) -> list[Record]:
    """What the job wrote down of its attempts."""
    return Attempts.of(RunFolder(clone.run_folder), job).records


def test_four_nodes_meet_and_run_the_code_that_was_submitted(
    clone: Clone, slurm: SlurmCluster, job_id: Callable[[Done], str]
) -> None:
    clone.behave(reduce=True)
    profile = clone.output.parent / "mine.yaml"
    told = clone.output.parent / "told"
    profile.write_text(
        "setup: [export GREETING=hello]\nenvironment: {NCCL_SOCKET_IFNAME: ib0}\nmaster_addr: lo\n"
        "node_environment: {'node[34]': {NCCL_SOCKET_IFNAME: ib1}}\nsrun: {label: false, cpu-bind: none}\n"
        f"notify: echo $REFINER_EVENT $REFINER_MESSAGE >> {told}\n"
    )
    words = ("--nodes", "4", *CPU, "--wait", "--cluster", str(profile), "--set", "refiner.recipe.epochs=2")
    inside = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "9999999", "SLURM_NTASKS": "64", "SBATCH_TIMELIMIT": "1"}
    done = clone.submit(*words, env=slurm.env | inside | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    assert "4 cores a process" in done.stderr  # all that a node has
    assert "warning: 4 cores a process for 4 loader workers" not in done.stderr  # the quickstart has fewer
    seen, job = clone.seen(), job_id(done)
    assert [seen[f"{rank}.0"]["host"] for rank in range(4)] == ["node1", "node2", "node3", "node4"]
    for rank in range(4):
        told_rank = seen[f"{rank}.0"]
        assert (told_rank["RANK"], told_rank["WORLD_SIZE"], told_rank["sum"]) == (str(rank), "4", 4.0)
        for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
            assert told_rank[name] == value
        assert told_rank["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(told_rank["MASTER_PORT"]) < 30000
        assert (told_rank["GREETING"], told_rank["NCCL_SOCKET_IFNAME"]) == ("hello", "ib0" if rank < 2 else "ib1")
        assert Path(told_rank["code"]).is_relative_to(clone.run_folder / "code" / job)
        assert (told_rank["python"], told_rank["epochs"]) == (sys.executable, 2)
    assert "rank 0 of the double" in done.stdout  # the log was shown
    assert "COMPLETED, exit code 0" in done.stdout.splitlines()[-1]
    assert "cost: 0.0" in done.stdout and "process-hours" in done.stdout
    assert [line.split()[0] for line in told.read_text().splitlines()] == ["start", "end"]
    (record,) = records(clone, job)
    assert (record.nodes, record.tasks, record.cause) == ("node[1-4]", 4, "finished")
    environment = json.loads((clone.run_folder / f"jobs/{job}_environment.json").read_text())
    assert environment["host"] == "node1" and "torch" in environment["packages"]


def test_two_nodes_with_two_gpus_each_get_four_tasks(clone: Clone, slurm: SlurmCluster) -> None:
    done = clone.submit("--nodes", "2", "--wait", env=slurm.env)
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    told = [clone.seen()[f"{rank}.0"] for rank in range(4)]
    assert [(one["host"], one["LOCAL_RANK"]) for one in told] == [
        *(("node1", "0"), ("node1", "1"), ("node2", "0"), ("node2", "1")),
    ]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {"0,1"}
    assert {one["LOCAL_WORLD_SIZE"] for one in told} == {"2"}
    assert {one["MASTER_ADDR"] for one in told} == {"node1"}


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
    clone.behave(r0=["hang"], r1=["early"], r2=["late"], r3=["hang"])  # "early" would take TERM for a preemption
    done = clone.submit("--nodes", "4", *CPU, "--wait", env=slurm.env)
    assert done.returncode == 3, done.stdout + done.stderr + clone.logs()
    ending = done.stdout.strip().splitlines()[-1]
    assert "FAILED, exit code 3 (Slurm: FAILED, NonZeroExitCode, exit code 3:0); rank 2 (node3) diverged" in ending
    assert ending.endswith("_2_log.out")
    assert set(clone.seen()) == {"0.0", "1.0", "2.0", "3.0"}


def test_a_killed_rank_brings_the_job_back_while_it_gets_further(clone: Clone, slurm: SlurmCluster) -> None:
    """Signal 9 leaves no word in the rank's log, and rank 0, on another node, complains of a lost connection."""
    peer = {"say": "RuntimeError: Connection closed by peer [127.0.1.2]:4153", "code": 1, "after": 2.2}
    clone.behave(r0=["step", peer], r1=[75, "kill"])
    job = clone.submit_here(slurm, nodes=2)
    clone.wait_for("0.2", "1.2", seconds=120)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    told = records(clone, job)
    assert [record.cause for record in told] == ["interrupted", "crashed", "finished"]
    assert (told[1].rank, told[1].node, told[1].exit_code) == (1, clone.seen()["1.1"]["host"], 137)
    ports = {clone.seen()[f"0.{attempt}"]["MASTER_PORT"] for attempt in range(3)}
    assert len(ports) == 3  # a port that is taken once is not taken again


def test_a_node_that_fails_twice_in_a_row_is_left_out(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["hang", "hang"], r1=["kill", "verdict"])
    job = clone.submit_here(slurm, nodes=2)
    clone.wait_for("0.2", "1.2", seconds=120)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    first, second, third = records(clone, job)
    assert (first.cause, second.cause, third.cause) == ("crashed", "hung", "finished")
    assert second.action == "requeue without the node" and second.node == first.node == "node2"
    assert f"ExcNodeList={first.node}" in slurm.client("scontrol", "show", "job", job)
    assert first.node not in {clone.seen()[who]["host"] for who in ("0.2", "1.2")}


def test_a_node_with_a_fault_is_left_out_before_anything_is_trained(clone: Clone, slurm: SlurmCluster) -> None:
    tool = clone.output.parent / "faulty/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU1: GPU is lost.'; exit 15\n")
    tool.chmod(0o755)
    faulty = {"node1": {"PATH": f"{tool.parent}:{slurm.env['PATH']}"}}
    slow = {"PATH": f"{slow_scontrol(clone.output.parent, slurm)}:{slurm.env['PATH']}"}
    job = clone.submit_here(slurm, gpus=2, node_environment=faulty, environment=slow)
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=180) == "COMPLETED"
    first, *others, last = records(clone, job)
    assert (first.cause, first.node, last.nodes) == ("unhealthy node", "node1", "node2")
    assert "GPU is lost" in first.evidence and "node1 is not healthy" in first.reason
    assert {(other.cause, other.node) for other in others} == {("on a node to be left out", "node1")}
    assert "-15" not in clone.logs() and "did not requeue" not in clone.logs()  # no command was ended half-way
    assert {clone.seen()[who]["host"] for who in (f"0.{last.number}", f"1.{last.number}")} == {"node2"}
    assert "0.0" not in clone.seen() and "0.1" not in clone.seen()


def test_a_killed_supervisor_brings_the_job_back(clone: Clone, slurm: SlurmCluster) -> None:
    """It is the batch script itself, without which Slurm ends a job."""
    clone.behave(r0=["saved"], r1=["hang"])
    job = clone.submit_here(slurm, nodes=2)
    clone.wait_for("0.0", "1.0")
    (supervisor,) = processes("launch.supervisor", str(clone.run_folder))
    os.kill(supervisor, signal.SIGKILL)
    clone.wait_for("0.1", "1.1", seconds=90)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    first, last = records(clone, job)
    assert (first.cause, first.symptom, first.action) == ("crashed", "supervisor killed", "requeue")
    assert last.cause == "finished"
    end = time.monotonic() + 120
    while processes("launch.standby", str(clone.run_folder)):  # one whose task has left leaves too
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_job_that_gets_no_further_ends_with_the_exit_code_of_what_failed(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["raise"] * 9)
    done = clone.submit(*CPU, "--wait", env=slurm.env)
    assert done.returncode == 1
    assert done.stdout.count("\nRuntimeError: the double was asked to crash") == 3  # three tracebacks
    assert "3 times in a row it got no further than checkpoint none" in done.stdout.splitlines()[-1]


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
    assert [record.cause for record in records(clone, job)] == ["interrupted", "finished"]


def test_interrupted_jobs_come_back_whoever_interrupts_them(clone: Clone, slurm: SlurmCluster) -> None:
    """A signal before training has begun; a time limit; ``scontrol requeue``; and not scancel."""
    runs = {name: clone.another(name) for name in ("early", "limit", "requeued", "cancelled")}
    runs["early"].behave(r0=["early"])
    for name in ("limit", "requeued", "cancelled"):
        runs[name].behave(r0=["saved"])
    jobs = {name: run.submit_here(slurm) for name, run in runs.items() if name != "limit"}
    jobs["limit"] = runs["limit"].submit_here(slurm, hours=1 / 60, signal_seconds=58)  # told two seconds in
    for name in ("early", "requeued", "cancelled"):
        runs[name].wait_for("0.0")
    signal_tasks(slurm, jobs["early"])
    slurm.client("scontrol", "requeue", jobs["requeued"])
    slurm.client("scancel", jobs["cancelled"])
    assert slurm.wait(jobs["cancelled"], "CANCELLED", "FAILED", "PENDING") == "CANCELLED"
    for name in ("early", "limit", "requeued"):
        runs[name].wait_for("0.1")
        assert slurm.wait(jobs[name], "COMPLETED", "FAILED") == "COMPLETED"
    assert "it was cancelled" in runs["cancelled"].logs() and set(runs["cancelled"].seen()) == {"0.0"}
    assert "Slurm has requeued it" in runs["requeued"].logs()
    assert "cancelled:" not in runs["requeued"].logs() and "not requeued" not in runs["requeued"].logs()


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


def test_a_requeue_waits_for_a_controller_that_is_away(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["saved"])
    job = clone.submit_here(slurm)
    clone.wait_for("0.0")
    slurm.controller_down()
    try:
        (clone.run_folder / "go").touch()
        time.sleep(3)  # long enough to be refused once
    finally:
        slurm.controller_up()
    clone.wait_for("0.1", seconds=90)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"


def test_an_elastic_job_starts_with_what_there_is_and_grows(clone: Clone, slurm: SlurmCluster) -> None:
    """Three nodes are given to it, over two of which its batch divides; the fourth comes free meanwhile."""
    blocker = slurm.client("sbatch", "--parsable", "-N1", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300")
    slurm.wait(blocker, "RUNNING")
    clone.behave(r0=["saved"])
    job = clone.submit_here(slurm, nodes=4, least=2, batch=32, grow_minutes=0.05)
    clone.wait_for("0.0", "1.0")
    slurm.client("scancel", blocker)
    clone.wait_for("0.1", "1.1", "2.1", "3.1", seconds=90)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    told = {who: (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for who, one in clone.seen().items()}
    assert told == {"0.0": ("2", "1"), "1.0": ("2", "1"), **dict.fromkeys(("0.1", "1.1", "2.1", "3.1"), ("4", "1"))}
    assert "2 of 3 nodes are used" in clone.logs() and "to restart on 4" in clone.logs()


def test_a_chain_is_submitted_at_once_and_each_run_starts_from_the_one_before(
    clone: Clone, slurm: SlurmCluster
) -> None:
    for name, text in {"a": "{}", "b": "{}", "c": json.dumps({"model": {"init_from": "runs/a"}})}.items():
        file = {"extends": "quickstart.json", "refiner": {**json.loads(text), "run": {"name": name}}}
        (clone.root / f"ds_configs/{name}.json").write_text(json.dumps(file))
    files = [str(clone.root / f"ds_configs/{name}.json") for name in "abc"]
    place = ("--set", f"refiner.run.output={clone.output}")
    command = (sys.executable, str(clone.root / "launch/submit.py"), *place, *CPU, "--config", files[0])
    env = {**slurm.env, "REFINER_DS_CACHE": str(clone.cache)}
    twice = subprocess.run((*command, "--then", files[0]), env=env, capture_output=True, text=True)
    assert twice.returncode == 2 and "as an earlier run of the chain does" in twice.stderr
    words = (*command, "--then", files[1], "--then", files[2], "--wait")
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=clone.output.parent, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = {}
    for name in "abc":
        (run_file,) = (clone.output / name / "code").glob("*/run.json")
        starts[name] = json.loads(run_file.read_text())["refiner"]["model"]["init_from"]
        assert clone.another(name).seen().keys() == {"0.0"}
    assert starts == {"a": None, "b": str(clone.output / "a"), "c": str(clone.output / "a")}


def test_of_two_submissions_at_once_one_is_taken(clone: Clone, slurm: SlurmCluster) -> None:
    clone.behave(r0=["saved"])
    env = {**slurm.env, "REFINER_DS_CACHE": str(clone.cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": clone.output.parent}
    both = [subprocess.Popen(clone.command(*CPU), env=env, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    ended = [(one.communicate(timeout=120), one.returncode) for one in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    ((_, refusal),) = [said for said, code in ended if code == 2]
    assert "another submission of this run is under way" in refusal or "belongs to job" in refusal
    assert len(list(clone.run_folder.glob("code/*"))) == 1


def test_a_job_whose_run_folder_was_given_to_another_does_not_start(clone: Clone, slurm: SlurmCluster) -> None:
    job = clone.submit_here(slurm, sbatch={"begin": "now+3"})
    (clone.run_folder / "jobs/owner").write_text("999999\n")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert "belongs to job 999999 now" in clone.logs() and not clone.seen()


def test_waiting_can_be_left_and_the_job_continues(clone: Clone, slurm: SlurmCluster) -> None:
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
    assert "continues; scancel" in said
    assert "RUNNING" in slurm.squeue().values()
