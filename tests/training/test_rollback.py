"""One rank's batch is poisoned in a real run: all ranks act alike, samples are named, and training comes through."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from refiner_ds.config import load
from refiner_ds.data.locate import open_index
from refiner_ds.data.sampler import TrainSampler
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.recovery import sample_keys
from tests.training.launched import ROOT, environment, ranks
from tests.training.test_resume import TRAIN, arguments

STEP = 8  # whose batch on rank 1 is poisoned


def train(output: Path, poison: str = "", **more: object):
    path = f"{ROOT / 'tests' / 'drill' / 'poison'}:{ROOT}"
    env = {**environment(REFINER_POISON=poison), "PYTHONPATH": path}
    settings = {"refiner.run.checkpoint_epochs": 0.1, "refiner.run.eval_epochs": 1, **more}  # every third step
    return ranks(TRAIN, *arguments(output, **settings), env=env)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    done = train(output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "quickstart"


@pytest.fixture(scope="module")
def poisoned_sample(undisturbed: Path) -> tuple[int, str]:
    """A sample of rank 1 in that step, and its key."""
    run = load(None, [])
    index = open_index(run.refiner.data.train, run.refiner.data.cache)
    batch = run.batch(2)
    sampler = TrainSampler(index.count, batch.global_batch, batch.micro_batch, 1, 2, run.refiner.run.seed)
    sample = int(sampler[STEP - 1].samples_B[5])
    return sample, sample_keys(index, [sample])[0]


def loss_of(run: Path) -> float:
    return next(line["loss"] for line in read_metrics(run, "eval") if line["weights"] == "model")


def weights_of(run: Path) -> bytes:
    latest = RunFolder(run).latest_checkpoint()
    assert latest is not None
    return (latest / "model.safetensors").read_bytes() + (latest / "ema.safetensors").read_bytes()


@pytest.mark.timeout(600)
def test_samples_that_break_the_loss_again_are_left_out(
    undisturbed: Path, poisoned_sample: tuple[int, str], tmp_path: Path
) -> None:
    sample, key = poisoned_sample
    done = train(tmp_path, f"sample:{sample}", **{"refiner.run.on_divergence": "rollback"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    run = tmp_path / "quickstart"
    said = re.findall(rf"step {STEP}: the loss is nan \(rank 1, micro-batch 0, loss nan: (.*)\)(.*)", done.stdout)
    assert [end for _, end in said] == [
        ": the same steps are computed again",
        ", as before: it is persistent, and the samples of the step are left out",
    ]
    incident = json.loads((run / "divergence.json").read_text())["incidents"]
    assert [(entry["step"], entry["verdict"], entry["tries"]) for entry in incident] == [(STEP, "persistent", 2)]
    assert key in incident[0]["suspects"][0]["keys"] and incident[0]["suspects"][0]["rank"] == 1
    logged = [line["step"] for line in read_metrics(run, "train")]
    assert logged == [step for step in range(1, 31) if step != STEP]
    assert abs(loss_of(run) - loss_of(undisturbed)) < 0.1 * loss_of(undisturbed)


@pytest.mark.timeout(600)
def test_a_fault_that_does_not_come_back_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "poison").write_text("1")
    done = train(tmp_path, f"once:{tmp_path / 'poison'}", **{"refiner.run.on_divergence": "rollback"})
    assert done.returncode != 0 and "nothing has been saved yet" in done.stdout  # the first step: nowhere to go back to
    done = train(tmp_path, f"once:{tmp_path / 'poison'}", **{"refiner.run.on_divergence": "rollback"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert weights_of(tmp_path / "quickstart") == weights_of(undisturbed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_run_stops_or_skips_with_the_samples_named(
    policy: str, undisturbed: Path, poisoned_sample: tuple[int, str], tmp_path: Path
) -> None:
    sample, key = poisoned_sample
    done = train(tmp_path, f"sample:{sample}", **{"refiner.run.on_divergence": policy})
    run = tmp_path / "quickstart"
    if policy == "stop":
        assert done.returncode == 3
        assert re.search(rf"stopped at step {STEP}: the loss is nan \(rank 1, micro-batch 0, loss nan: ", done.stdout)
        latest = RunFolder(run).latest_checkpoint()
        assert latest is not None and latest.name == "step_00000006"
        return
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"step {STEP} is skipped: the loss is nan (rank 1, micro-batch 0, loss nan: " in done.stdout
    incident = json.loads((run / "divergence.json").read_text())["incidents"][0]
    assert incident["verdict"] == "skipped" and key in incident["suspects"][0]["keys"]
    assert abs(loss_of(run) - loss_of(undisturbed)) < 0.1 * loss_of(undisturbed)
    assert read_metrics(run, "train")[-1]["skipped_steps"] == 1
