"""Commands on runs that are named oddly, nodes that are down, numbers that come again: what is said is true."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import checks, jobs, slurm, snapshot, submission, submit
from launch.attempts import Attempts
from launch.slurm import Nodes
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

MIB = 2**20


@pytest.fixture
def here(clone: Clone, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A clone whose commands are typed in this process, in its folder, with the code taken for checked."""
    for key, value in {**slurm.env, "REFINER_DS_CACHE": str(clone.output.parent / "cache")}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(snapshot, "ROOT", clone.root)
    monkeypatch.setattr(checks, "check_ready", lambda *_, **__: checks.Ready(True, None))
    monkeypatch.chdir(clone.output.parent)
    return clone


Say = Callable[..., str]


@pytest.fixture
def say(here: Clone, capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command says, on both streams, when it leaves as told."""

    def said(main: Callable[[list[str]], int], *words: str, code: int = 0) -> str:
        assert main([*words]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return said


def typed(run: Clone, *words: str) -> list[str]:
    place = ("--set", f"refiner.run.output={run.output}", "--set", f"refiner.run.name={run.name}")
    return ["--config", str(run.root / "ds_configs/quickstart.json"), "--gpus-per-node", "0", *place, *words]


@pytest.mark.slurm
def test_runs_of_odd_names_are_submitted_and_found(here: Clone, slurm: SlurmCluster, say: Say) -> None:
    names = ("it's my run", 'a"b', "$HOME", "b:evaluate", "quickstart 2", "quickstart")
    numbers = {}
    for name in names:
        said = say(submit.main, *typed(here.another(name)))
        numbers[name] = said.partition("job ")[2].partition(":")[0]
        status = next(line for line in said.splitlines() if line.startswith("  status"))
        line = status.removeprefix("  status").strip().replace("python ", f"{sys.executable} ", 1)
        if name == names[0]:  # the line as it is printed, in a shell
            shown = subprocess.run(("sh", "-c", line), cwd="/", env=os.environ, capture_output=True, text=True)
            assert f"run folder   {here.output}/{name}" in shown.stdout, shown.stderr
    for name in names:
        slurm.wait(numbers[name], "COMPLETED", "FAILED")
        assert f"job {numbers[name]}: it finished" in say(jobs.main, "why", name), here.another(name).logs()
        assert "rank 0 of the double" in say(jobs.main, "logs", name)
    assert "take what follows a % in a path" in say(submit.main, *typed(here.another("100%job")), code=2)
    assert {folder.name for folder in here.output.iterdir() if folder.is_dir()} == set(names)


@pytest.mark.slurm
def test_what_has_ended_is_not_cancelled_nor_begun_again_where_nothing_is_left(
    here: Clone, slurm: SlurmCluster, say: Say
) -> None:
    job = here.submit_here(slurm)
    slurm.wait(job, "COMPLETED", "FAILED")
    assert f"job {job} has ended already (COMPLETED)" in say(jobs.main, "cancel", job, code=2)
    assert f"job {job} has finished" in say(jobs.main, "requeue", job, code=2)
    here.another("failed").behave(r0=[2])
    failed = here.another("failed").submit_here(slurm)
    slurm.wait(failed, "COMPLETED", "FAILED")
    (here.output / "failed/jobs/owner").write_text("999999\n")
    assert "belongs to job 999999 now" in say(jobs.main, "requeue", failed, code=2)
    (here.output / "failed/jobs/owner").write_text(f"{failed}\n")
    assert "starts again" in say(jobs.main, "requeue", failed)


@pytest.mark.slurm
def test_a_number_that_slurm_has_given_to_another_job_is_not_the_runs(
    here: Clone, slurm: SlurmCluster, say: Say
) -> None:
    """As after a cluster was set up anew, and counts from 1."""
    (here.output.parent / "other folder").mkdir()
    other = slurm.client("sbatch", "--parsable", "--chdir=other folder", "--output=/dev/null", "--wrap", "sleep 60")
    slurm.wait(other, "RUNNING")
    folder = RunFolder(here.run_folder)
    folder.jobs.mkdir(parents=True)
    (folder.jobs / f"{other}_submission.sh").touch()
    Attempts.of(folder, other).begin("node9", 1, 0, folder)
    assert slurm_says(folder, other) == f"{other}: LOST"
    assert "RUNNING" not in say(jobs.main, "list")
    assert "no longer knows" in say(jobs.main, "why", here.name)
    say(jobs.main, "cancel", here.name, code=2)
    assert slurm.squeue(other)[other] == "RUNNING"
    assert not slurm_unfinished(folder)
    assert "job " in say(submit.main, *typed(here))


def slurm_says(folder: RunFolder, job: str) -> str:
    found = jobs.of_folder(folder, job)
    assert found is not None
    return f"{job}: {jobs.ask_slurm(found, 20).word}"


def slurm_unfinished(folder: RunFolder) -> dict[str, str]:
    return slurm.unfinished_jobs(folder.jobs)


def test_a_number_that_two_runs_had_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "jobs").mkdir(parents=True)
        (tmp_path / "runs" / name / "jobs/7_submission.sh").touch()
    with pytest.raises(LaunchError, match="7: several runs had a job of this number, give the folder: .*/a, .*/b"):
        jobs.find("7")


@pytest.mark.slurm
def test_nodes_that_are_down_do_not_keep_a_run_from_being_submitted_and_are_told(
    here: Clone, slurm: SlurmCluster, say: Say
) -> None:
    slurm.client("scontrol", "update", "NodeName=node[3-4]", "State=DRAIN", "Reason=new fans")
    try:
        wide = typed(here, "--nodes", "4")
        told = (
            "2 of 4 nodes of the default partition take jobs; the others are down or drained (node3, node4: new fans)"
        )
        assert f"quickstart: Slurm would not start it now: {told}" in say(submit.main, *wide, "--dry-run")
        assert "Slurm would start it now" in say(submit.main, *typed(here, "--nodes", "2"), "--dry-run")
        assert "would start it now" in say(submit.main, *wide, "--min-nodes", "2", "--dry-run")
        assert "has 4 nodes, not 6; lower --nodes" in say(submit.main, *typed(here, "--nodes", "6"), code=2)
        said = say(submit.main, *wide)
        assert f"warning: it will wait: {told}" in said
        job = said.partition("job ")[2].partition(":")[0]
    finally:
        slurm.client("scontrol", "update", "NodeName=node[3-4]", "State=RESUME")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"


@pytest.mark.slurm
def test_a_dry_run_says_what_a_job_would_wait_for(here: Clone, slurm: SlurmCluster, say: Say) -> None:
    slurm.client("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        low = typed(here, "--partition", "low")
        assert "would not start it now: partition low is down" in say(submit.main, *low, "--dry-run")
    finally:
        slurm.client("scontrol", "update", "PartitionName=low", "State=UP")
    for limit, words in (
        ("--time=60", "Slurm would start it at 2"),
        ("--time=0", "since jobs before it have no time limit"),
    ):
        blocker = slurm.client(
            "sbatch", "--parsable", "-N3", "--exclusive", "--output=/dev/null", limit, "--wrap", "sleep 99"
        )
        slurm.wait(blocker, "RUNNING")
        said = say(submit.main, *typed(here, "--nodes", "2"), "--dry-run")
        assert words in said and "1 of 4 nodes of the default partition are idle, of 2 asked for" in said
        slurm.cancel_all()


def test_a_partition_of_which_too_few_nodes_take_jobs_is_told_and_one_that_is_too_small_is_not_said_to_wait() -> None:
    nodes = Nodes("partition gpu", (8,), 96, 1, count=4, away={"n3": "none", "n4": "lost"})
    assert nodes.wait(2) == "" == nodes.wait(5)
    assert nodes.wait(3).endswith("are down or drained (n3, n4: lost)")
    assert Nodes("partition gpu", (8,), 96, 1).wait(3) == ""  # not counted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB, on which a snapshot finds no room."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk))).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(("umount", str(disk)), check=True)


@pytest.mark.slurm
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(here: Clone, say: Say, small_disk: Path) -> None:
    place = ("--set", f"refiner.run.output={small_disk}")
    said = say(submit.main, *typed(here), *place, code=2)
    assert f"error: {small_disk}/quickstart: cannot be written: no room is left; free some, or set" in said
    assert said.count("\n") < 10 and not list(small_disk.iterdir())
    assert "no room is left" in say(submit.main, *typed(here), *place, "--local", code=2)
    assert not list(small_disk.iterdir())


@pytest.mark.slurm
def test_a_job_whose_run_folder_could_not_be_made_its_own_is_taken_back(
    here: Clone, slurm: SlurmCluster, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission, "take_ownership", full)
    assert "no room is left" in say(submit.main, *typed(here), code=2)
    assert set(slurm.squeue().values()) <= {"CANCELLED", "COMPLETED", "FAILED", "COMPLETING"}
    assert not here.run_folder.exists()


@pytest.mark.slurm
def test_a_setup_line_that_leaves_and_a_launcher_that_was_purged_are_told(
    here: Clone, slurm: SlurmCluster, say: Say
) -> None:
    runs = {name: here.another(name) for name in ("exit", "purged")}
    left = runs["exit"].submit_here(slurm, setup=["exit 0"])
    purged = runs["purged"].submit_here(slurm, sbatch={"begin": "now+2"}, environment={"PYTHONPATH": ""})
    shutil.rmtree(here.output / "purged/code" / purged / "launch")
    for job in (left, purged):
        assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert "setup line failed (exit code 2): exit 0" in say(jobs.main, "why", "exit")
    assert "snapshot damaged" in (told := say(jobs.main, "why", "purged")) and "submit the run again" in told


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs/long")
    run.jobs.mkdir(parents=True)
    (run.jobs / "7_0_log.out").write_text("a line of the log\n" * 100_000)
    (run.jobs / "7_submission.sh").touch()
    command = f"{sys.executable} {ROOT}/launch/jobs.py logs runs/long | head -n 1"
    env = {**os.environ, "REFINER_DS_CACHE": str(tmp_path), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a line of the log\n", "")
