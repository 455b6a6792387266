"""``launch/jobs.py`` on staged failures: all submitted at once to a real Slurm, then asked about one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import jobs
from launch.attempts import Attempts
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

pytestmark = pytest.mark.slurm


def raising(name: str, text: str) -> dict[str, Any]:
    return {"raise": [name, text]}


def saying(line: str, code: int) -> dict[str, Any]:
    return {"say": line, "code": code}


@dataclass(frozen=True)
class Staged:
    """A failure that is made, and words of the sentence that tells it."""

    ranks: dict[str, list[Any]]
    words: tuple[str, ...]
    profile: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1


RESET = "RuntimeError: Connection closed by peer [127.0.1.2]:4153"
CHECKPOINT = "error: /runs/x/checkpoints/step_00000100/model.safetensors: 7 bytes where 900 were written"
FAILURES = {
    "killed": Staged({"r0": ["hang"], "r1": ["kill"]}, ("rank 1", "killed", "exit code 137"), nodes=2),
    "peer": Staged({"r0": [saying(RESET, 1) | {"after": 2}], "r1": ["kill"]}, ("rank 1 (", "killed"), nodes=2),
    "segfault": Staged({"r0": [{"die": 11}]}, ("rank 0", "segmentation fault", "exit code 139")),
    "host_memory": Staged(
        {"r0": [raising("MemoryError", "cannot take 40 GB")]}, ("out of memory on the host", "mem_gb")
    ),
    "gpu_memory": Staged(
        {"r0": [raising("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB")]},
        ("out of memory on the GPU", "train_micro_batch_size_per_gpu"),
    ),
    "gpu_fault": Staged(
        {"r0": [raising("RuntimeError", "CUDA error: uncorrectable ECC error encountered")]}, ("GPU fault", "exclude")
    ),
    "nccl": Staged(
        {"r0": [raising("DistBackendError", "NCCL error: unhandled system error, ncclSystemError")]},
        ("network between ranks", "NCCL_SOCKET_IFNAME"),
    ),
    "hung": Staged({"r0": ["hang"], "r1": ["verdict"]}, ("rank 1", "hung", "no progress", "rank_1.stacks"), nodes=2),
    "diverged": Staged({"r0": [saying("stopped at step 40: the loss is nan", 3)]}, ("diverged", "nan", "recipe.lr")),
    "disk_full": Staged({"r0": ["full"]}, ("disk full", "step_00000001/model", "refiner.run.output")),
    "quota": Staged({"r0": [raising("OSError", "[Errno 122] Disk quota exceeded: '/runs'")]}, ("disk quota exceeded",)),
    "port": Staged({"r0": [raising("OSError", "[Errno 98] Address already in use")]}, ("port taken", "another port")),
    "module": Staged({"r0": [raising("ModuleNotFoundError", "No module named 'tiimm'")]}, ("module missing", "tiimm")),
    "library": Staged(
        {"r0": [raising("ImportError", "libcudart.so.12: cannot open shared object file")]},
        ("import failed", "libcudart", "setup"),
    ),
    "data": Staged({"r0": [saying("error: /data/train: shard-000003.tar is cut", 2)]}, ("shard-000003.tar is cut",)),
    "checkpoint": Staged({"r0": [saying(CHECKPOINT, 2)]}, ("checkpoint damaged", "step_00000100", "requeue it")),
    "exception": Staged({"r0": ["raise"]}, ("rank 0", "RuntimeError: the double was asked to crash", "traceback")),
    "stale": Staged({"r0": [raising("OSError", "[Errno 116] Stale file handle: '/data'")]}, ("file system error",)),
    "permission": Staged(
        {"r0": [raising("PermissionError", "[Errno 13] Permission denied: '/data/train'")]}, ("permission denied",)
    ),
    "setup": Staged(
        {}, ("setup line failed", "module load cuda/99", "cluster profile"), {"setup": ["module load cuda/99"]}
    ),
    "interface": Staged({}, ("no interface ib7", "master_addr"), {"master_addr": "ib7"}, nodes=2),
    "preempted": Staged({"r0": ["saved"]}, ("asked to stop", "requeue: false"), {"partition": "low"}),
    "time_limit": Staged({"r0": ["saved"]}, ("asked to stop",), {"hours": 1 / 60, "signal_seconds": 58}),
    "cancelled": Staged({"r0": ["saved"]}, ("it was cancelled",)),
    "stopped_unsaved": Staged({"r0": ["hang"]}, ("it was cancelled",)),
    "purged": Staged({}, ("purged in part", "submit"), {"sbatch": {"begin": "now+5"}}),
    "invisible": Staged({}, ("could not open its log", "every node sees it"), {"sbatch": {"begin": "now+5"}}),
    "supervisor": Staged({"r0": ["hang"]}, ("supervisor on node", "killed", "requeue: false")),
    "owner": Staged({}, ("belongs to job 999999 now",), {"sbatch": {"begin": "now+5"}}),
}
LONG = {  # told by the same few lines of code as others: among the long tests
    "peer", "segfault", "host_memory", "gpu_fault", "quota", "port", "module", "library", "checkpoint", "exception",
    "stale", "permission", "interface", "time_limit", "stopped_unsaved",
}  # fmt: skip
WAITING = {
    "held": ("held", "scontrol release"),
    "begin": ("starts again in a moment", "expected to start"),
    "dependency": ("will never start",),
    "resources": ("it waits until enough nodes are free",),
}


@dataclass
class Stage:
    """What was submitted: the runs and their jobs."""

    clone: Clone
    slurm: SlurmCluster
    jobs: dict[str, str]

    def ask(self, *words: str, env: dict[str, str] | None = None) -> str:
        """What ``jobs.py`` answers."""
        done = subprocess.run(
            (sys.executable, str(ROOT / "launch/jobs.py"), *words),
            env={**(env or self.slurm.env), "REFINER_DS_CACHE": str(self.clone.cache)},
            cwd=self.clone.output.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def _staged(slurm: SlurmCluster, folder: Path, names: Collection[str]) -> Iterator[Stage]:
    """Failures of the table, submitted, done and over."""
    clone = Clone.with_double(folder, folder / "cache")
    numbers = {}
    for name in sorted(names):
        staged, run = FAILURES[name], clone.another(name)
        run.behave(**staged.ranks)
        numbers[name] = run.submit_here(slurm, nodes=staged.nodes, requeue=False, **staged.profile)
    if "purged" in numbers:
        (clone.output / "purged/code" / numbers["purged"] / "refiner_ds/models/stem.py").unlink()
    if "invisible" in numbers:
        shutil.rmtree(clone.output / "invisible/jobs")
    if "owner" in numbers:
        (clone.output / "owner/jobs/owner").write_text("999999\n")
    stage = Stage(clone, slurm, numbers)
    try:
        _interfere(stage)
        yield stage
    finally:
        slurm.cancel_all()


@pytest.fixture(scope="module")
def stage(slurm_of_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Half of the table's failures."""
    with _staged(slurm_of_session, tmp_path_factory.mktemp("stage"), set(FAILURES) - LONG) as stage:
        yield stage


def _interfere(stage: Stage) -> None:
    """Cancel, preempt and kill what is to be, and wait until all failures are over."""
    slurm = stage.slurm
    signals = {
        "cancelled": (), "stopped_unsaved": (), "supervisor": ("--signal=KILL", "--batch"),
        "preempted": ("--signal=TERM",),
    }  # fmt: skip
    for name in stage.jobs.keys() & signals.keys():
        stage.clone.another(name).wait_for("0.0", seconds=200)
        slurm.client("scancel", *signals[name], stage.jobs[name])
    for job in stage.jobs.values():
        slurm.wait(job, "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "COMPLETED", "PREEMPTED", seconds=200)


@contextmanager
def _waiting(stage: Stage) -> Iterator[None]:
    """Jobs that do not start."""
    slurm, failed = stage.slurm, stage.jobs["diverged"]
    runs = {name: stage.clone.another(name) for name in WAITING}
    stage.jobs["held"] = runs["held"].submit_here(slurm, sbatch={"begin": "now+60"})
    slurm.client("scontrol", "uhold", stage.jobs["held"])
    stage.jobs["begin"] = runs["begin"].submit_here(slurm, sbatch={"begin": "now+600"})
    stage.jobs["dependency"] = runs["dependency"].submit_here(slurm, sbatch={"dependency": f"afterok:{failed}"})
    blocker = slurm.client("sbatch", "--parsable", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    slurm.wait(blocker, "RUNNING")
    stage.jobs["resources"] = runs["resources"].submit_here(slurm)
    end = time.monotonic() + 120
    while not {"DependencyNeverSatisfied", "Resources"} <= set(slurm.client("squeue", "-ho%r").split()):
        assert time.monotonic() < end, slurm.client("squeue", "-ho%r")
        time.sleep(0.5)
    yield
    slurm.client("scancel", blocker)


def test_why_tells_every_staged_failure(stage: Stage) -> None:
    """At least 19 of 20 are asked for."""
    failed = list(stage.jobs)
    with _waiting(stage):
        _assert_all_told(stage, {name: FAILURES[name].words for name in failed} | WAITING)


@pytest.mark.long
@pytest.mark.slow
def test_why_tells_every_other_failure(slurm_of_session: SlurmCluster, tmp_path: Path) -> None:
    with _staged(slurm_of_session, tmp_path, LONG) as stage:
        _assert_all_told(stage, {name: FAILURES[name].words for name in LONG})


def _assert_all_told(stage: Stage, wanted: Mapping[str, tuple[str, ...]]) -> None:
    told = {name: _why(stage, name) for name in wanted}
    wrong = {
        name: told[name]
        for name, words in wanted.items()
        if not all(word in told[name] for word in words) or "\n" in told[name]
    }
    assert not wrong, f"{len(wrong)} of {len(wanted)}: {json.dumps(wrong, indent=1)}"


def _why(stage: Stage, name: str) -> str:
    """In this process: a hundredth of the time of another's start."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in stage.slurm.env.items():
            patch.setenv(key, value)
        job = jobs.of_folder(RunFolder(stage.clone.output / name), stage.jobs[name])
        assert job is not None
        return jobs.ask_slurm(job, seconds=20).why()


def test_a_run_is_found_by_folder_name_and_number(stage: Stage) -> None:
    folder, number = stage.clone.output / "killed", stage.jobs["killed"]
    answers = {stage.ask("why", target) for target in (str(folder), "killed", number)}
    assert len(answers) == 1 and f"job {number}: rank 1 (" in answers.pop()


def test_status_and_list_tell_attempts_and_cost_also_without_a_controller(stage: Stage) -> None:
    for gone in (False, True):
        if gone:
            stage.slurm.controller_down()
        try:
            began = time.monotonic()
            told, listed = stage.ask("status", "killed"), stage.ask("list", "--limit", "100")
            seconds = time.monotonic() - began
        finally:
            if gone:
                stage.slurm.controller_up()
        print(f"{seconds:.1f} s for status and list, controller {'away' if gone else 'there'}")
        assert "attempt 0" in told and "killed (exit code 137)" in told and "process-hours" in told
        rows = {line.split()[0]: line for line in listed.splitlines()}
        assert (
            FAILURES.keys() - LONG - {"invisible"} <= rows.keys()
            and "FAILED" in rows["killed"]
            and stage.jobs["killed"] in rows["killed"]
        )


def test_logs_are_those_of_the_rank(stage: Stage) -> None:
    assert "rank 1 of the double, attempt 0" in stage.ask("logs", "killed", "--rank", "1")
    assert "requeue: false" in stage.ask("logs", "killed")


def test_a_job_is_requeued_and_cancelled_by_its_name(stage: Stage) -> None:
    run = stage.clone.another("again")
    run.behave(r0=["saved", "hang"])
    job = run.submit_here(stage.slurm)
    run.wait_for("0.0")
    assert "saves and starts again" in stage.ask("requeue", "again")
    run.wait_for("0.1")
    assert "restarted 1 time" in stage.ask("why", "again")
    stage.ask("cancel", "again")
    assert stage.slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    assert len(Attempts.of(RunFolder(run.run_folder), job).records) == 2


def test_what_is_not_there_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert jobs.main(["why", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing: no run that was submitted from here")
    assert jobs.main(["list"]) == 0
