"""``launch/scripts``: DeepSpeed's launcher and torchrun as plain batch jobs, on two nodes of a real Slurm.

A stand-in for training shows that ranks meet, are told and come back; training itself shows where it ends.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.metrics import read_metrics
from tests.slurm.cluster import SlurmCluster
from tests.training.launched import environment, ranks

from .conftest import ROOT, Clone

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]


# Two blocks and 48 steps: enough to be interrupted in twice, not to learn much.
SMALL = {
    "train_batch_size": 120,
    "refiner": {
        "model": {"depth": 2},
        "recipe": {"epochs": 4, "warmup_epochs": 0.5, "cooldown_epochs": 0},
        "run": {"checkpoint_steps": 3, "eval_epochs": 4, "picture_epochs": None, "log_steps": 1},
    },
}


def submit(slurm: SlurmCluster, launcher: str, folder: Path, code: Path, limit: str, *flags: str) -> str:
    """A script on two nodes, a process each, in a folder and with its log there. Returns the job's number.

    Args:
        code: where refiner_ds is imported from.
        limit: sbatch's flag; "" for none.
        flags: of the training.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # launchers are commands of the environment
    variables = f"--export=ALL,PATH={path},PYTHONPATH={code},PROCESSES=1,OMP_NUM_THREADS=1"
    asked = (f"--chdir={folder}", f"--output={folder / 'log'}", variables, "--nodes=2", "--cpus-per-task=1")
    script = str(ROOT / f"launch/scripts/{launcher}.sbatch")
    return slurm.client("sbatch", "--parsable", *asked, *filter(None, [limit]), script, *flags)


def run_file(folder: Path, cache: Path, name: str) -> Path:
    """The quickstart made small, with its run folder beside it."""
    data = {"cache": str(cache), "workers": 0}
    run = {**SMALL["refiner"]["run"], "output": str(folder), "name": name}
    keys = {**SMALL, "extends": str(ROOT / "ds_configs/quickstart.json")}
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**keys, "refiner": {**SMALL["refiner"], "data": data, "run": run}}))
    return file


def course(run: Path) -> tuple[Any, ...]:
    """Where a run has ended and what it logged on the way; a step done twice counts by its last line."""
    newest = RunFolder(run).latest_checkpoint()
    assert newest is not None
    figures = ("loss", "lr", "grad_norm", "top1")
    lines = {(kind, line["step"], line.get("weights")): [line.get(one) for one in figures]
             for kind in ("train", "eval") for line in read_metrics(run, kind)}  # fmt: skip
    return read_state(newest).step, lines, *((newest / f"{one}.safetensors").read_bytes() for one in ("model", "ema"))


@pytest.mark.parametrize(
    "launcher, limit", [("deepspeed", ""), pytest.param("torchrun", "--time=4", marks=pytest.mark.long)]
)
def test_ranks_of_two_nodes_meet_save_when_told_and_come_back(
    launcher: str, limit: str, clone: Clone, slurm: SlurmCluster
) -> None:
    """DeepSpeed's launcher by a hostfile, and without ssh; torchrun is told by Slurm, two minutes before the limit."""
    clone.behave(reduce=True, r0=["slowly"], r1=["slowly"])
    folder, log = clone.output.parent, clone.output.parent / "log"
    run = {"extends": str(clone.root / "ds_configs/quickstart.json"), "refiner": {"run": {"output": str(clone.output)}}}
    (folder / "quickstart.json").write_text(json.dumps(run))
    job = submit(slurm, launcher, folder, clone.root, limit, "--config", "quickstart.json")
    end = time.monotonic() + 200
    while not {"0.0", "1.0"} <= set(clone.seen()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    hostfile = folder / f"hostfile.{job}"
    assert launcher == "torchrun" or hostfile.read_text() == "node1 slots=1\nnode2 slots=1\n"
    if not limit:
        slurm.client("scancel", "--batch", "--signal=USR2", job)
    ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=400)
    assert ended == "COMPLETED", log.read_text()
    assert "Restarts=1" in slurm.client("scontrol", "show", "job", job) and not hostfile.exists()
    # Six seconds of saving are more than Slurm leaves to a task of a step that has failed (KillWait).
    assert len(list((clone.run_folder / "seen").glob("*.saved"))) == 2
    assert "User defined signal" not in log.read_text()  # a launcher that died of it, as srun tells
    assert not re.search(r"STEP .* DUE TO JOB REQUEUE", log.read_text())  # nor were its tasks ended by the requeue
    seen = clone.seen()
    assert seen.keys() == {"0.0", "1.0", "0.1", "1.1"}
    assert {(one["WORLD_SIZE"], one["sum"]) for one in seen.values()} == {("2", 2.0)}
    assert [seen[f"{rank}.1"]["host"] for rank in range(2)] == ["node1", "node2"]
    assert seen["0.0"]["MASTER_PORT"] != seen["0.1"]["MASTER_PORT"]


@pytest.mark.long
@pytest.mark.parametrize(
    "first, second, told, ended",
    [("hang", {"say": "a crash", "code": 1}, False, "FAILED"),
     (*2 * [{"say": "done", "code": 0, "after": 15}], True, "COMPLETED")],
    ids=["a crash ends it on both nodes", "it has finished though it was told to save"],
)  # fmt: skip
def test_a_job_that_was_not_told_to_save_or_has_finished_does_not_start_again(
    first: Any, second: Any, told: bool, ended: str, clone: Clone, slurm: SlurmCluster
) -> None:
    clone.behave(r0=[first], r1=[second])
    folder, log = clone.output.parent, clone.output.parent / "log"
    run = {"extends": str(clone.root / "ds_configs/quickstart.json"), "refiner": {"run": {"output": str(clone.output)}}}
    (folder / "quickstart.json").write_text(json.dumps(run))
    job = submit(slurm, "deepspeed", folder, clone.root, "", "--config", "quickstart.json")
    clone.wait_for("0.0", "1.0", seconds=200)
    if told:
        slurm.client("scancel", "--batch", "--signal=USR2", job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "PENDING", seconds=200) == ended, log.read_text()
    assert "Restarts=0" in slurm.client("scontrol", "show", "job", job)
    assert clone.seen().keys() == {"0.0", "1.0"} and not list(folder.glob("hostfile*"))


@pytest.mark.long
def test_training_told_to_save_and_then_requeued_without_a_word_ends_where_an_undisturbed_run_does(
    slurm: SlurmCluster, tmp_path: Path, cache: Path
) -> None:
    """In two more lives: one resumes what was saved when told, the next what the newest checkpoint holds."""
    calm = run_file(tmp_path, cache, "calm")
    done = ranks(ROOT / "refiner_ds/train.py", "--config", calm, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    disturbed, log = run_file(tmp_path, cache, "disturbed"), tmp_path / "log"
    run = RunFolder(tmp_path / "disturbed")
    job = submit(slurm, "deepspeed", tmp_path, ROOT, "", "--config", str(disturbed))

    def until_some_steps_after(step: int) -> None:
        end = time.monotonic() + 150
        while (steps := [line["step"] for line in read_metrics(run.path, "train")] or [0])[-1] < step + 4:
            assert time.monotonic() < end, f"at step {steps[-1]}; {log.read_text()}"
            time.sleep(0.1)

    until_some_steps_after(0)
    slurm.client("scancel", "--batch", "--signal=USR2", job)
    slurm.wait(job, "PENDING", seconds=100)
    saved = read_state(run.latest_checkpoint()).step
    until_some_steps_after(saved)
    slurm.client("scontrol", "requeue", job)
    slurm.wait(job, "PENDING", seconds=60)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=250) == "COMPLETED", log.read_text()
    assert "Restarts=2" in slurm.client("scontrol", "show", "job", job)
    lives = [json.loads(line) for line in run.history.read_text().splitlines()]
    assert [life["step"] for life in lives[:2]] == [0, saved] and saved < lives[2]["step"] < 48, lives
    assert [len(life["processes"]) for life in lives] == [2, 2, 2]
    assert course(run.path) == course(tmp_path / "calm")
