"""A chain that is typed again goes on with what is missing of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from launch import checks, snapshot, submit
from launch.allocation import Allocation
from launch.attempts import Attempts, Record
from launch.chain import Stage, looked_up
from launch.cluster import ClusterProfile
from launch.commands import Command
from refiner_ds.config import load
from refiner_ds.config.finished import is_finished
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import Clone


class Chain:
    """Trainings a and b, of which b starts from a, and commands on b; on this machine."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "runs"

    def run(self, name: str, *sets: str) -> Allocation:
        start = [f"refiner.model.init_from={self.output}/a"] if name == "b" else []
        run = load(None, [f"refiner.run.output={self.output}", f"refiner.run.name={name}", *start, *sets])
        return Allocation(run, ClusterProfile(), nodes=1, gpus=0, local=True)

    def words(
        self, *commands: str, a: tuple[str, ...] = (), b: tuple[str, ...] = (), typed_in: str = "/x"
    ) -> list[str]:
        """How far a, b and the commands have come."""
        first, second = self.run("a", *a), self.run("b", *b)
        follow = [Command(tuple(words.split()), words.split()[0], typed_in) for words in commands]
        last = [Allocation(second.run, ClusterProfile(), 1, 0, local=True, command=command) for command in follow]
        found = looked_up([Stage(each, []) for each in (first, second, *last)])
        return [stage.standing.words for stage in found]

    def trained(self, name: str, *sets: str) -> None:
        """As training leaves a run that it has finished."""
        run = self.run(name, *sets).run
        folder = RunFolder(run.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(json.dumps(run.resolved()))
        folder.complete.write_text(json.dumps({"step": 40, "epochs": run.refiner.recipe.all_epochs}))

    def did(self, job: str, words: str, cause: str | None = "finished", after: float = 5, typed_in: str = "/x") -> None:
        """As a job leaves its snapshot and attempts, so many seconds after training was complete."""
        folder = RunFolder(self.output / "b")
        (folder.code / job).mkdir(parents=True)
        known = {"label": words.split()[0], "runs": words, "typed_in": typed_in}
        (folder.code / job / "job.json").write_text(json.dumps(known))
        folder.jobs.mkdir(exist_ok=True)
        attempts = Attempts(folder.jobs / f"{job}_attempts.json", [Record(0, 1.0, "node1", 1, 0, None, cause=cause)])
        attempts.write()
        moment = folder.complete.stat().st_mtime + after
        os.utime(attempts.file, (moment, moment))


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_what_has_finished_is_left_alone_and_what_has_not_is_missing(chain: Chain) -> None:
    assert chain.words("evaluate", "export") == ["", "", "", ""]
    chain.trained("a")
    assert chain.words("evaluate", "export") == ["finished", "", "", ""]
    chain.trained("b")
    chain.did("7", "evaluate")
    chain.did("8", "export", cause="crashed")
    assert chain.words("evaluate", "export") == ["finished", "finished", "finished", ""]
    chain.did("9", "export")
    assert chain.words("evaluate", "export")[2:] == ["finished"] * 2
    chain.did("10", "evaluate", cause=None)  # the newest counts
    assert chain.words("evaluate", "export")[2:] == ["", "finished"]


def test_a_command_has_finished_if_it_was_this_one_and_came_after_training(chain: Chain) -> None:
    chain.trained("a")
    chain.trained("b")
    chain.did("7", "evaluate --data v2=sets/v2")
    chain.did("8", "export", after=-5)  # of what training had reached before
    assert chain.words("evaluate --data v2=sets/v2", "export")[2:] == ["finished", ""]
    assert chain.words("evaluate", "evaluate --data v1=sets/v1")[2:] == ["", ""]
    assert chain.words("evaluate --data v2=sets/v2", typed_in="/elsewhere")[2:] == [""]  # where sets/v2 is another
    chain.did("9", "evaluate")
    assert chain.words("evaluate", typed_in="/elsewhere")[2:] == ["finished"]


def test_what_starts_from_a_run_that_trains_further_is_missing_too(chain: Chain) -> None:
    chain.trained("a")
    chain.trained("b")
    chain.did("7", "evaluate")
    assert chain.words("evaluate", a=("refiner.recipe.epochs=99",)) == ["", "", ""]
    assert chain.words("evaluate", b=("refiner.recipe.epochs=99",)) == ["finished", "", ""]


def test_a_finished_run_is_this_one_and_says_where_its_recipe_was_another(chain: Chain) -> None:
    chain.trained("a", "refiner.recipe.lr=1e-4")
    assert chain.words()[0] == "finished, with another lr"
    assert is_finished(chain.run("a").run) and not is_finished(chain.run("a", "refiner.model.depth=2").run)
    (chain.output / "a/complete.json").write_text('{"step": 40}')  # as earlier versions wrote it
    assert is_finished(chain.run("a").run)
    (chain.output / "a/complete.json").write_text('{"step": 40, "epochs": "many"}')
    assert not is_finished(chain.run("a").run)
    (chain.output / "a/complete.json").write_text('{"step":')
    assert not is_finished(chain.run("a").run)


@pytest.mark.slurm
def test_a_chain_typed_again_submits_what_is_missing_and_leaves_jobs_that_run(
    clone: Clone, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, and with the code taken for checked: the starts of two more would take longer than the jobs."""
    for key, value in {**slurm.env, "REFINER_DS_CACHE": str(clone.cache)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(snapshot, "ROOT", clone.root)
    monkeypatch.setattr(checks, "check_ready", lambda *_, **__: checks.Ready(True, None))
    files = {name: clone.root / f"ds_configs/{name}.json" for name in "abc"}
    for name, file in files.items():
        file.write_text(json.dumps({"extends": "quickstart.json", "refiner": {"run": {"name": name}}}))

    def typed(*then: str) -> tuple[str, list[str]]:
        words = ["--config", str(files["a"]), "--gpus-per-node", "0", "--set", f"refiner.run.output={clone.output}"]
        assert submit.main([*words, *(word for file in then for word in ("--then", file))]) == 0
        said = capsys.readouterr().out
        return said, re.findall(r"^job (\d+): ", said, re.MULTILINE)

    both = str(files["b"]), str(files["c"])
    clone.another("b").behave(r0=[2])
    _, (first, failed, cancelled) = typed(*both)
    assert slurm.wait(cancelled, "CANCELLED", "COMPLETED") == "CANCELLED"
    assert (slurm.squeue(first)[first], slurm.squeue(failed)[failed]) == ("COMPLETED", "FAILED")
    (clone.output / "a/complete.json").write_text('{"step": 40}')

    clone.another("b").behave(r0=["hang"])
    said, (again, last) = typed(*both)
    assert said.startswith("a: finished\n") and f"afterok:{again}" in slurm.client("squeue", "-ho%E", "-j", last)
    slurm.wait(again, "RUNNING")
    said, none = typed(*both)
    assert not none and f"b: job {again} (RUNNING)\nc: job {last} (PENDING)\nnothing to submit" in said
    _, (longer,) = typed(*both, "export")
    assert f"afterok:{last}" in slurm.client("squeue", "-ho%E", "-j", longer)
    # A job of another run file is not the chain's, whatever the run folder is called.
    assert submit.main(["--config", str(files["b"]), "--gpus-per-node", "0", "--set", "refiner.recipe.lr=1e-4",
                        "--set", f"refiner.run.output={clone.output}", "--then", "export"]) == 2  # fmt: skip
    assert f"belongs to job {again} (RUNNING)" in capsys.readouterr().err
