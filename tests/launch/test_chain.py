"""Train, fine-tune larger, evaluate, export: one command, four jobs, each after the one before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import submission, submit
from launch.attempts import Attempts
from launch.chain import stages
from launch.cluster import ClusterProfile
from launch.commands import Command, command_of
from refiner_ds.config import load
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone

TINY = {
    "refiner.model.depth": 2, "refiner.model.patch_size": 14, "refiner.model.attention": "tiled",
    "refiner.recipe.epochs": 0.25, "refiner.recipe.warmup_epochs": 0.1, "refiner.recipe.cooldown_epochs": 0,
    "refiner.run.picture_epochs": "null", "refiner.run.eval_epochs": 100, "train_batch_size": 120,
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """A chain that was submitted: its jobs' numbers, in order."""

    slurm: SlurmCluster
    folder: Path
    cache: Path
    jobs: list[str]

    def ask(self, *words: str) -> str:
        """What ``jobs.py`` answers."""
        env = {**self.slurm.env, "REFINER_DS_CACHE": str(self.cache)}
        command = (sys.executable, str(ROOT / "launch/jobs.py"), *words)
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)
        return (done.stdout or done.stderr).strip()


def submitted(slurm: SlurmCluster, folder: Path, cache: Path, *then: str) -> list[str]:
    """A chain of small runs a and b, of which b has larger images, as ``submit.py`` submits it once it is checked."""
    small: dict[str, Any] = {"extends": str(ROOT / "ds_configs/quickstart.json"), "refiner": {"run": {"name": "a"}}}
    large = {**small, "refiner": {"run": {"name": "b"}, "model": {"img_size": 42}}}
    for name, run_file in (("a", small), ("b", large)):
        (folder / f"{name}.json").write_text(json.dumps(run_file))
    sets = [f"{key}={value}" for key, value in {**TINY, "refiner.run.output": f"{folder}/runs"}.items()]
    asked, profile = Namespace(nodes=1, min_nodes=None), ClusterProfile(gpus_per_node=0, cpus_per_task=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for key, value in {**slurm.env, "REFINER_DS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(key, value)
        jobs = list[str]()
        for stage in stages("a.json", list(then), sets, lambda run, what: submit.allocate(asked, profile, run, what)):
            if stage.allocation.command:
                stage.allocation.command.check(stage.allocation.run)
            jobs.append(submission.submit(stage.allocation, after=jobs).job_id)
    return jobs


@pytest.fixture(scope="module")
def chain(slurm_of_session: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Two trainings and what follows them; the evaluation is requeued on its way, and all are over."""
    slurm, folder = slurm_of_session, tmp_path_factory.mktemp("chain")
    cache = folder / "cache"  # which knows of no other runs by these names
    (folder / "names").write_text("\n".join(map(str, range(10))) + "\n")
    jobs = submitted(slurm, folder, cache, "b.json", "evaluate --classes names", "export --license apache-2.0")
    chain = Chain(slurm, folder, cache, jobs)
    try:
        assert "it waits for the job it depends on" in chain.ask("why", "b:evaluate")
        slurm.wait(jobs[2], "RUNNING", "FAILED", "CANCELLED", seconds=450)
        run = RunFolder(folder / "runs/b")
        slurm._until(lambda: Attempts.of(run, jobs[2]).records, "the evaluation begins", 60)
        slurm.client("scontrol", "requeue", jobs[2])
        slurm.wait(jobs[3], "COMPLETED", "FAILED", "CANCELLED", seconds=300)
        yield chain
    finally:
        slurm.cancel_all()


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.slurm
def test_each_job_starts_after_the_one_before_and_leaves_its_results_in_the_run_folder(chain: Chain) -> None:
    assert [chain.slurm.squeue(job)[job] for job in chain.jobs] == ["COMPLETED"] * 4, chain.ask("list")
    runs, run = {name: RunFolder(chain.folder / "runs" / name) for name in "ab"}, RunFolder(chain.folder / "runs/b")
    spans = []
    for folder, job in zip((runs["a"], run, run, run), chain.jobs, strict=True):
        records = Attempts.of(folder, job).records
        spans.append((records[0].started, records[-1].ended))
    assert all(ended <= started for (_, ended), (started, _) in zip(spans[:-1], spans[1:], strict=True))
    config = json.loads(run.config.read_text())["refiner"]["model"]
    assert (config["img_size"], config["init_from"]) == (42, str(runs["a"].path))
    (result,) = run.evaluation.glob("*/*.json")
    assert json.loads(result.read_text())["img_size"] == 42
    assert "license: apache-2.0" in (run.export / "README.md").read_text()
    # The evaluation was requeued from outside, and did it all again from its own snapshot.
    first, last = Attempts.of(run, chain.jobs[2]).records
    assert first.cause in ("interrupted", None) and last.cause == "finished"  # None: it had no time to write it down
    assert (run.code / chain.jobs[2] / "run.json").is_file()
    assert (run.jobs / "owner").read_text().strip() == chain.jobs[1]


@pytest.mark.slow
@pytest.mark.slurm
def test_every_job_of_a_chain_is_looked_after_by_its_name(chain: Chain) -> None:
    rows = {line.split()[0]: line.split() for line in chain.ask("list").splitlines()[1:]}
    assert [rows[name][1:3] for name in ("a", "b", "b:evaluate", "b:export")] == [
        [job, "COMPLETED"] for job in chain.jobs
    ]
    assert "runs         evaluate --classes names" in (told := chain.ask("status", "b:evaluate"))
    assert "process-hours; 1 restart" in told and "steps done twice" not in told
    assert "top-1 " in chain.ask("logs", "b:evaluate") and "it finished" in chain.ask("why", "runs/b:export")
    assert "no calibrate was submitted to follow that run" in chain.ask("status", "b:calibrate")


@pytest.mark.slurm
def test_what_follows_a_run_that_fails_is_cancelled_and_says_why(clone: Clone, slurm: SlurmCluster) -> None:
    (clone.output.parent / "mine.yaml").write_text("setup: [no-such-module load]\n")
    words = ("--gpus-per-node", "0", "--cluster", "mine.yaml", "--then", "evaluate", "--then", "export", "--wait")
    done = clone.submit(*words, env=slurm.env)
    assert done.returncode == 1, done.stdout + done.stderr
    first, evaluation, _, *_ = re.findall(r"^job (\d+): ", done.stdout, re.MULTILINE)
    assert f"jobs.py status {clone.run_folder}:evaluate" in done.stdout and "  runs        export" in done.stdout
    ending = done.stdout.strip().splitlines()[-1]
    assert "CANCELLED" in ending and f"job {evaluation}, which it follows, did not finish" in ending
    assert slurm.squeue(first)[first] == "FAILED" and slurm.squeue(evaluation)[evaluation] == "CANCELLED"


def command(*words: str) -> Command:
    return Command(words, words[0], ".")


def test_what_can_follow_is_a_run_file_or_a_command() -> None:
    first = command_of("evaluate --data v2=/data/v2", [])
    assert first is not None and (first.label, first.words) == ("evaluate", ("evaluate", "--data", "v2=/data/v2"))
    again = command_of("evaluate", [first])
    assert again is not None and again.label == "evaluate-2"
    assert command_of("mine.json", []) is None
    for given, said in (("evalute", "did you mean evaluate?"), ("mine", "or one of evaluate, calibrate, export")):
        with pytest.raises(LaunchError, match=f"--then {given}: is no run file and no command; .*{said}"):
            command_of(given, [])
    with pytest.raises(LaunchError, match="No closing quotation"):
        command_of("evaluate 'x", [])


def test_a_command_that_cannot_be_meant_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    run = load(None, [])
    command("evaluate").check(run)
    command("export", "--onnx").check(run)
    command("calibrate", "--data", f"x={tmp_path}").check(run)
    without = load(None, ["refiner.data.val=null"])
    command("export").check(without)
    for words, on, said in (
        (("evaluate",), without, "has no refiner.data.val; give --data SET"),
        (("calibrate",), without, "has no refiner.data.val; give --data SET"),
        (("evaluate", "--data", f"v2={tmp_path}/v2"), run, f"{tmp_path}/v2: no such set"),
        (("evaluate", "--dta", "x"), run, "--then evaluate --dta x: unrecognized arguments: --dta x"),
        (("evaluate", "--batch", "0"), run, "--batch 0: must be 1 or more"),
        (("export", "--crop-ratio", "9"), run, "--crop-ratio 9: must lie between 0.1 and 4"),
        (("calibrate", "--held-out", "2"), run, "--held-out 2: must lie between 0 and 1"),
    ):
        with pytest.raises(LaunchError) as refusal:
            command(*words).check(on)
        assert said in str(refusal.value) and "\n" not in str(refusal.value)
