"""The learning rate and the length of a run are functions of samples seen, and timm's in shape."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from refiner_ds.config.batch import split_batch
from refiner_ds.config.schema import RecipeKeys
from refiner_ds.training.schedule import Schedule


def schedule(images: int = 1000, batch: int = 100, **recipe: float) -> Schedule:
    keys = {"epochs": 20, "warmup_epochs": 2, "cooldown_epochs": 3, "lr": 1e-3, "lr_batch": 50, **recipe}
    return Schedule(RecipeKeys(**keys), split_batch(batch, None, 1), images)


def test_it_is_timms_cosine_at_every_step() -> None:
    mine = schedule()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=mine.peak)
    theirs = CosineLRScheduler(
        optimizer, t_initial=200, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-6, t_in_epochs=False, cycle_limit=1
    )
    for step in range(mine.total_steps):
        theirs.step_update(step)
        assert mine.lr(100 * step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_the_peak_scales_with_the_global_batch_and_the_floor_does_not() -> None:
    assert schedule(batch=100).peak == 2e-3 and schedule(batch=200).peak == 4e-3
    assert schedule(batch=200).lr(22 * 1000) == 1e-5
    assert schedule(lr_batch=None).peak == 1e-3


def test_the_same_samples_give_the_same_rate_for_any_number_of_processes() -> None:
    recipe = RecipeKeys(epochs=20, warmup_epochs=2)
    one, many = (Schedule(recipe, split_batch(96, None, world), 1000) for world in (1, 8))
    assert [one.lr(96 * step) for step in range(99)] == [many.lr(96 * step) for step in range(99)]


def test_cool_down_comes_after_the_schedule() -> None:
    assert schedule().total_steps == 230
    assert schedule(images=1001).steps_an_epoch == 11  # the last batch is padded


def test_constant_stays_at_the_peak() -> None:
    fine_tuning = schedule(schedule="constant", warmup_epochs=0)  # type: ignore[arg-type]
    assert {fine_tuning.lr(100 * step) for step in range(fine_tuning.total_steps)} == {fine_tuning.peak}
