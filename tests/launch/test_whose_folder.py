"""Whose a run folder is: which job starts in it, whose lock a job removes, and what the jobs of one are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import jobs, submission, supervisor
from launch.allocation import Allocation
from launch.attempts import Attempts, Record, owner, take_ownership
from launch.cluster import ClusterProfile
from launch.commands import Command
from launch.policy import Decision, Limits
from launch.supervisor import Job, Outcome, Supervisor
from refiner_ds.config import load
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

JOB = "7"


class OfTwoNodes(Supervisor):
    """A supervisor whose tasks leave a lock in the run folder, and have ended well."""

    nodes = "node[1-2]"
    world = (2, 0)
    lock = ""

    def run_tasks(self, variables: dict[str, str]) -> Outcome:
        self.run_folder.lock.write_text(self.lock)
        return Outcome([], 0)

    def act(self, record: Record, decide: Callable[[Limits], Decision]) -> int:
        return self.conclude(record, decide(Limits()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(supervisor, "check_code", lambda code: None)
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path / "cache"))
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.jobs.mkdir(parents=True)
    return run


def supervised(folder: RunFolder, label: str, lock: str = "", **profile: str) -> OfTwoNodes:
    code = folder.code / JOB
    code.mkdir(parents=True)
    job = Job(ClusterProfile(**profile), 2, 1, 0, 2, label)
    (code / "job.json").write_text(json.dumps(job.to_json()))
    found = OfTwoNodes(folder, JOB, code)
    found.lock = lock
    return found


@pytest.mark.parametrize(
    "owned, label, starts", [("8", "", False), (JOB, "", True), (None, "", True), ("8", "evaluate", True)]
)
def test_only_the_job_that_a_run_folder_belongs_to_trains_in_it_and_what_follows_needs_not_own_it(
    owned: str | None, label: str, starts: bool, folder: RunFolder
) -> None:
    if owned is not None:
        take_ownership(folder, owned)
    code = supervised(folder, label).attempt()
    (record,) = Attempts.of(folder, JOB).records
    assert folder.lock.exists() is starts and owner(folder) == owned
    assert (code, record.cause) == ((0, "finished") if starts else (2, "refused"))
    assert starts or f"{folder}: belongs to job 8 now; this one ends" in str(record)


def lock_of(host: str) -> str:
    return json.dumps({"host": host, "pid": 1, "began": "1", "machine": "x", "token": "y"})


@pytest.mark.parametrize(
    "label, lock, stays",
    [
        ("", lock_of("node2"), False),
        ("", lock_of("node3"), True),
        ("", "[]", True),
        ("evaluate", lock_of("node2"), True),
    ],
    ids=["left", "of another node", "damaged", "of training, after a command"],
)
def test_a_lock_is_removed_by_the_training_that_left_it_on_its_own_nodes_alone(
    label: str, lock: str, stays: bool, folder: RunFolder
) -> None:
    supervised(folder, label, lock).attempt()
    assert folder.lock.exists() is stays


@pytest.mark.parametrize("label, name", [("", "tiny"), ("evaluate", "tiny:evaluate")])
def test_a_job_tells_of_itself_by_the_name_of_its_run_and_of_its_command(
    label: str, name: str, folder: RunFolder, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    supervised(folder, label, notify=f'echo "$REFINER_RUN: $REFINER_MESSAGE" >> {told}').attempt()
    assert told.read_text().splitlines() == [
        f"{name}: {name} (job {JOB}): started on node[1-2]",
        f"{name}: {name} (job {JOB}): finished",
    ]


def test_each_job_of_a_run_folder_is_found_by_its_name_and_the_newest_of_a_name(folder: RunFolder) -> None:
    take_ownership(folder, JOB)
    folder.metrics.write_text('{"kind": "train", "step": 40, "loss": 1.0, "time": 1.0}\n')
    submitted = {JOB: "", "8": "evaluate", "10": "evaluate", "9": "export", "11": "evaluate-2"}
    for number, label in submitted.items():
        (folder.code / number).mkdir(parents=True)
        job = {"label": label, "local": True} | ({"runs": f"{label} --x"} if label else {})
        (folder.code / number / "job.json").write_text(json.dumps(job))
    assert jobs.find(str(folder)).name == "tiny" and jobs.find(str(folder)).job_id == JOB
    assert [(job.name, job.job_id) for job in jobs.commands_of(folder)] == [
        ("tiny:evaluate", "10"), ("tiny:export", "9"), ("tiny:evaluate-2", "11"),
    ]  # fmt: skip
    for label, number in (("evaluate", "10"), ("export", "9"), ("evaluate-2", "11")):
        assert jobs.find(f"{folder}:{label}").job_id == number
        told = jobs.status(jobs.find(f"{folder}:{label}"))
        assert f"runs         {label} --x" in told and "step " not in told
    assert "step         40" in jobs.status(jobs.find(str(folder)))
    with pytest.raises(LaunchError, match="tiny:calibrate: no calibrate was submitted to follow that run"):
        jobs.find(f"{folder}:calibrate")


@pytest.mark.parametrize("follows", [False, True])
def test_training_takes_the_run_folder_and_what_follows_it_leaves_it_and_its_snapshots_alone(
    follows: bool, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    pruned: list[RunFolder] = []

    def executor(allocation: Allocation, **_: object) -> SimpleNamespace:
        named.append(allocation.name)
        return SimpleNamespace(send=lambda task: SimpleNamespace(job_id="9"))

    monkeypatch.setattr(submission, "Executor", executor)
    monkeypatch.setattr(submission, "prune", pruned.append)
    monkeypatch.setattr(submission.checks, "refuse_unfinished", lambda *_, **__: None)
    take_ownership(folder, JOB)
    run = load(None, [f"refiner.run.output={folder.path.parent}", "refiner.run.name=tiny"])
    command = Command(("evaluate",), "evaluate", ".") if follows else None
    submission.submit(Allocation(run, ClusterProfile(), nodes=1, gpus=0, command=command))
    assert (owner(folder), len(pruned)) == ((JOB, 0) if follows else ("9", 1))
    known = json.loads((folder.code / "9" / "job.json").read_text())
    assert (known["label"], known.get("runs")) == (("evaluate", "evaluate") if follows else ("", None))
    assert named == ["tiny:evaluate" if follows else "tiny"]
