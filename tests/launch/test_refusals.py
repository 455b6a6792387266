"""What submit.py refuses, it refuses before it writes anything: one sentence, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.config import load
from refiner_ds.training.schedule import Schedule
from tests.slurm.cluster import SlurmCluster

from .conftest import Clone

pytestmark = pytest.mark.slow


@pytest.fixture
def refusal(clone: Clone):  # type: ignore[no-untyped-def]
    """The sentence that these words are refused with."""

    def sentence(*words: str, env: dict[str, str] | None = None) -> str:
        before = sorted(clone.output.parent.rglob("*"))
        done = clone.submit(*words, env=env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        written = set(clone.output.parent.rglob("*")) - set(before)
        assert not [file for file in written if "__pycache__" not in str(file)]
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and done.stderr.strip().endswith(said[0])
        return said[0].removeprefix("error: ")

    return sentence


LOCAL = ("--local", "--gpus-per-node", "0")


def test_where_there_is_no_slurm_local_is_suggested(refusal, no_slurm: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    assert "no Slurm here" in (said := refusal(env=no_slurm)) and "--local" in said
    assert "no Slurm here" in refusal("--dry-run", env=no_slurm)


def test_a_batch_that_does_not_divide(refusal) -> None:  # type: ignore[no-untyped-def]
    said = refusal(*LOCAL, "--nodes", "7")
    assert "train_batch_size 48 does not divide over 7 processes" in said and "42 and 49" in said


def test_a_misspelt_key_of_the_run_file_or_the_profile(refusal, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "did you mean epochs?" in refusal(*LOCAL, "--set", "refiner.recipe.epoch=3")
    (tmp_path / "mine.yaml").write_text("acount: vision\n")
    assert "did you mean account?" in refusal(*LOCAL, "--cluster", str(tmp_path / "mine.yaml"))


def test_a_password_that_the_job_would_store(refusal, clone: Clone) -> None:  # type: ignore[no-untyped-def]
    said = refusal(*LOCAL, "--set", "refiner.data.val=https://ann:hush@host/val")
    assert "refiner.data.val https://***@host/val" in said and "write it as ${NAME}" in said and "hush" not in said


def test_data_without_an_index(refusal, clone: Clone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clone.train_for_real()
    shards = tmp_path / "shards"
    train = ("--set", f"refiner.data.train={shards}")
    shards.mkdir()
    (shards / "shard-000000.tar").touch()
    assert str(shards) in refusal(*LOCAL, *train)


def test_an_output_folder_that_cannot_be_written(refusal, clone: Clone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clone.train_for_real()
    (tmp_path / "file").touch()
    said = refusal(*LOCAL, "--set", f"refiner.run.output={tmp_path / 'file'}")
    assert str(tmp_path / "file") in said and "refiner.run.output" in said


def test_a_run_that_is_complete(refusal, clone: Clone) -> None:  # type: ignore[no-untyped-def]
    clone.train_for_real()
    run = load(clone.root / "ds_configs/quickstart.json")
    total = Schedule(run.refiner.recipe, run.batch(1), images=1433).total_steps
    clone.run_folder.mkdir(parents=True)
    (clone.run_folder / "complete.json").write_text(json.dumps({"step": total}))
    small = (*LOCAL, "--set", "refiner.model.depth=2")  # which takes less to plan
    assert "refiner.run.name" in (said := refusal(*small)) and str(clone.run_folder) in said
    further = clone.submit(*small, "--dry-run", "--set", f"refiner.recipe.epochs={run.refiner.recipe.epochs + 1}")
    assert further.returncode == 0, further.stderr


def test_code_that_does_not_run(refusal, clone: Clone) -> None:  # type: ignore[no-untyped-def]
    train = clone.root / "refiner_ds/train.py"
    train.write_text("import no_such_module_anywhere\n")
    assert "No module named 'no_such_module_anywhere'" in refusal(*LOCAL)
    train.write_text("import sys\nsys.exit('error: refined_vti is not a model; did you mean refined_vit?')\n")
    assert refusal(*LOCAL) == "refined_vti is not a model; did you mean refined_vit?"


def test_a_number_of_nodes_or_gpus_that_cannot_be(refusal) -> None:  # type: ignore[no-untyped-def]
    assert "--nodes 0" in refusal("--local", "--nodes", "0")
    said = refusal("--local", "--gpus-per-node", "3", env={"CUDA_VISIBLE_DEVICES": "0"})
    assert said == "this machine has 1 GPUs for 3 processes; --gpus-per-node 0 uses its CPU"


@pytest.mark.slurm
def test_what_slurm_itself_would_refuse(refusal, slurm: SlurmCluster) -> None:  # type: ignore[no-untyped-def]
    assert "Slurm knows no node of partition fast" in refusal(
        "--gpus-per-node", "0", "--partition", "fast", env=slurm.env
    )
    cpu = ("--gpus-per-node", "0")
    assert "has 4 nodes, not 6; lower --nodes" in refusal("--nodes", "6", *cpu, env=slurm.env)
    assert "configuration is not available" in refusal(*cpu, "--cpus-per-task", "99", env=slurm.env)


@pytest.mark.slurm
def test_a_run_whose_job_has_not_ended(refusal, clone: Clone, slurm: SlurmCluster, job_id) -> None:  # type: ignore[no-untyped-def]
    clone.behave(r0=["hang"])
    first = job_id(clone.submit("--gpus-per-node", "0", env=slurm.env))
    clone.wait_for("0.0")
    said = refusal("--gpus-per-node", "0", env=slurm.env)
    assert f"belongs to job {first}" in said and f"scancel {first}" in said
    slurm.cancel_all()
    assert job_id(clone.submit("--gpus-per-node", "0", env=slurm.env)) != first


@pytest.mark.slurm
def test_a_dry_run_shows_the_script_and_writes_nothing(clone: Clone, slurm: SlurmCluster) -> None:
    done = clone.submit("--dry-run", "--nodes", "2", env=slurm.env)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2\n" in done.stdout
    assert "#SBATCH --gpus-per-node=2\n" in done.stdout  # as many as the nodes have
    assert not clone.output.exists()
    assert slurm.squeue() == {} or "PENDING" not in slurm.squeue().values()


def test_submitting_imports_no_torch(clone: Clone) -> None:
    (clone.root / "torch.py").write_text("raise SystemExit('something imported torch')\n")  # found before the real one
    done = clone.submit(*LOCAL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert clone.seen()["0.0"]["WORLD_SIZE"] == "1"


def test_what_was_checked_and_has_not_changed_is_not_checked_again(clone: Clone) -> None:
    """A dry run, the submission after it, and the next run of a sweep; not edited code, nor a run that has gone on."""

    def checked(run: Clone, *words: str) -> bool:
        done = run.submit(*LOCAL, "--dry-run", *words)
        assert done.returncode == 0, done.stderr
        return "nothing has changed" not in done.stderr

    assert [checked(clone), checked(clone), checked(clone.another("next"))] == [True, False, False]
    assert checked(clone, "--set", "refiner.recipe.lr=1e-4")
    (clone.root / "refiner_ds/models/stem.py").open("a").write("\n# edited\n")
    assert [checked(clone), checked(clone)] == [True, False]
    clone.run_folder.mkdir(parents=True)
    (clone.run_folder / "complete.json").write_text("{}")
    assert checked(clone)
    (clone.root / "refiner_ds/train.py").write_text("raise SystemExit('error: no')\n")
    assert clone.submit(*LOCAL, "--dry-run").returncode == 2
