"""``launch/jobs.py`` answers from run folders, at once, whatever becomes of Slurm's controller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import slurm as slurm_commands
from launch.asking import Question
from launch.attempts import Attempts, Record
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT

HEAVY = ("torch", "pydantic", "submitit", "deepspeed", "numpy", "yaml")
AS_COMMAND = f"""
import runpy, sys
sys.argv = ["jobs.py", *sys.argv[1:]]
try:
    runpy.run_path({str(ROOT / "launch/jobs.py")!r}, run_name="__main__")
finally:
    print("imported", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def run_of(folder: Path, name: str, job: str, **ended: object) -> RunFolder:
    """A run folder of a job that began, and ended as told."""
    run = RunFolder(folder / "runs" / name)
    run.jobs.mkdir(parents=True)
    (run.jobs / "owner").write_text(f"{job}\n")
    (run.jobs / f"{job}_submission.sh").touch()
    record = Record(0, time.time() - 60, "node1", 2, 0, None, **ended)  # type: ignore[arg-type]
    Attempts(run.jobs / f"{job}_attempts.json", [record]).write()
    line = {"kind": "train", "step": 40, "loss": 0.5, "time": time.time(), "step_seconds": 1.0}
    run.metrics.write_text(json.dumps(line) + "\n")
    return run


def ask(folder: Path, *words: str, env: dict[str, str]) -> tuple[str, set[str]]:
    """What ``jobs.py`` answers, and which heavy packages it has imported."""
    command = (sys.executable, "-c", AS_COMMAND, *words)
    given = {**env, "REFINER_DS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told, _, imported = done.stdout.partition("imported")
    return told, set(imported.split())


FAILED = {"ended": time.time(), "cause": "crashed", "exit_code": 137, "rank": 1, "node": "node2", "symptom": "killed",
          "evidence": "task 1: Killed", "action": "end", "reason": "its profile does not let it"}  # fmt: skip


@pytest.fixture
def away(slurm_of_session: SlurmCluster) -> Iterator[SlurmCluster]:
    """A Slurm whose controller takes questions and answers none."""
    (controller,) = [daemon for name, daemon in slurm_of_session._daemons.items() if name == "slurmctld"]
    controller.send_signal(signal.SIGSTOP)
    try:
        yield slurm_of_session
    finally:
        controller.send_signal(signal.SIGCONT)


@pytest.mark.slurm
def test_list_and_status_tell_what_run_folders_hold_when_the_controller_hangs(
    away: SlurmCluster, tmp_path: Path
) -> None:
    run_of(tmp_path, "lost", "7", **FAILED)
    run_of(tmp_path, "begun", "8")
    listed, imported = ask(tmp_path, "list", env=away.env)
    rows = {line.split()[0]: line.split() for line in listed.splitlines()}
    assert rows["lost"][1:4] == ["7", "FAILED", "40"] and rows["begun"][1:4] == ["8", "STARTED", "40"]
    assert listed.splitlines()[-1] == "Slurm does not answer: states are as run folders tell them"
    assert not imported
    told, imported = ask(tmp_path, "status", "lost", env=away.env)
    assert "7: FAILED" in told and "step         40, loss 0.5" in told and "rank 1 (node2) killed" in told
    assert "(Slurm does not answer; this is what the run folder tells)" in told
    assert not imported
    told, _ = ask(tmp_path, "why", "8", env=away.env)
    assert "had not ended when it last wrote (Slurm does not answer; this is" in told


@pytest.mark.slurm
def test_a_job_that_no_run_folder_has_is_not_waited_for(away: SlurmCluster, tmp_path: Path) -> None:
    done = subprocess.run(
        (sys.executable, str(ROOT / "launch/jobs.py"), "status", "99999"),
        cwd=tmp_path, env={**away.env, "REFINER_DS_CACHE": str(tmp_path)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2 and "99999: no run" in done.stderr and "Slurm does not answer" in done.stderr


@pytest.mark.slurm
def test_a_job_that_slurm_has_forgotten_is_lost_and_one_without_slurm_is_as_it_was(
    slurm_of_session: SlurmCluster, tmp_path: Path
) -> None:
    run_of(tmp_path, "begun", "99999")
    told, _ = ask(tmp_path, "status", "begun", env=slurm_of_session.env)
    assert "99999: LOST" in told and "Slurm no longer knows it: submit the run again" in told
    empty = tmp_path / "bin"
    empty.mkdir()
    told, _ = ask(tmp_path, "status", "begun", env={**os.environ, "PATH": str(empty)})
    assert "99999: STARTED" in told and "(there is no Slurm here; this is" in told


def test_a_question_is_asked_beside_what_goes_on_and_given_up_at_its_deadline() -> None:
    begun, end = threading.Event(), threading.Event()

    def silent(seconds: float) -> int:
        begun.set()
        end.wait(60)
        return 1

    question = Question(silent, 0.05)
    assert begun.wait(30)  # without anybody waiting for the answer
    assert question.answer is None and question.silence == "Slurm does not answer"
    end.set()


def test_a_log_is_followed_until_slurm_has_forgotten_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgotten(*_: object) -> None:
        raise slurm_commands.Forgotten("no longer")

    for answer, ended in ((forgotten, True), (lambda *_: None, False)):
        monkeypatch.setattr(slurm_commands, "job_state", answer)
        assert slurm_commands.has_ended("7") is ended
