"""A request to stop in the middle of an evaluation: saved before, left between two batches, made up for on resume."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from refiner_ds.data.batch import Batch
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.evaluation import EvaluationStopped, evaluate
from refiner_ds.training.metrics import read_metrics
from tests.training.launched import ranks, running_ranks
from tests.training.saving import ALONE, Alone
from tests.training.test_resume import TRAIN, arguments, pid_of_rank


class Rank(Alone):
    """One of two ranks; the other never wants to stop."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def batches(taken: list[int], count: int = 10) -> Iterator[Batch]:
    for number in range(count):
        taken.append(number)
        images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
        yield Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([True, True]))


class Model(torch.nn.Module):
    """Guesses class 0."""

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(images_B3HW), 2)


@pytest.mark.parametrize("asked_at", [0, 4])
def test_an_evaluation_ends_a_batch_after_any_rank_was_asked_to_stop(asked_at: int) -> None:
    taken: list[int] = []
    model = Model().train()
    world = Rank(0, 2, 0, torch.device("cpu"))
    half = (0.5, 0.5, 0.5)
    with pytest.raises(EvaluationStopped):
        evaluate(model, batches(taken), world, half, half, asked_to_stop=lambda: len(taken) > asked_at)
    assert taken[-1] == asked_at + 1 and model.training
    found = evaluate(model, batches(taken), ALONE_SUMS, half, half, asked_to_stop=lambda: False)
    assert (found.images, found.right1) == (20, 10)


ALONE_SUMS = Rank(0, 1, 0, ALONE.device)


def test_what_it_interrupts_is_saved_before_and_made_up_for_on_resume(tmp_path: Path) -> None:
    """One rank on two images at a time: long enough to be interrupted."""
    keys = {"refiner.data.eval_batch": 2, "refiner.run.eval_epochs": 0.2, "refiner.recipe.epochs": 0.2}
    keys |= {"refiner.recipe.warmup_epochs": 0, "refiner.data.workers": 0}
    folder = RunFolder(tmp_path / "quickstart")
    with running_ranks(TRAIN, *arguments(tmp_path, **keys), processes=1) as training:
        while folder.latest_checkpoint() is None:
            assert not training.done(), training.result()
            time.sleep(0.01)
        os.kill(pid_of_rank(folder.path, 0), signal.SIGTERM)
        done = training.result()
    assert done.returncode == 75 and "asked to stop: saved step 6" in done.stdout, done.stdout + done.stderr
    assert not read_metrics(folder.path, "eval") and not folder.complete.exists()
    again = ranks(TRAIN, *arguments(tmp_path, **{**keys, "refiner.data.eval_batch": 64}), processes=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [(line["step"], line["weights"]) for line in read_metrics(folder.path, "eval")] == [(6, "model"), (6, "ema")]
    assert folder.complete.exists()
