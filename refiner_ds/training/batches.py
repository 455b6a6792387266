"""This rank's batches of a run that is ready, as its run file asks for them."""

from __future__ import annotations

from collections.abc import Iterator

from refiner_ds.data.augment import AugmentSettings, EvalSettings
from refiner_ds.data.batch import Batch
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World


def train_batches_of(ready: Preparation, world: World, step: int) -> Iterator[Batch]:
    """Training batches from the one after ``step`` optimizer steps on, endless over epochs, on this rank's device."""
    keys = ready.run.refiner
    return train_batches(
        ready.train,
        AugmentSettings(keys.model.img_size, keys.recipe, keys.data.mean, keys.data.std),
        global_batch=ready.batch.global_batch,
        micro_batch=ready.batch.micro_batch,
        rank=world.rank,
        world_size=world.size,
        seed=keys.run.seed,
        position=step * ready.batch.global_batch,
        workers=keys.data.workers,
        on_bad_sample=keys.data.on_bad_sample,
        maps=ready.maps,
        decode=keys.data,
        repeats=keys.recipe.aug_repeats,
    ).handed_over(world.device)


def val_batches_of(ready: Preparation, world: World) -> Iterator[Batch]:
    """This rank's share of the validation set, which there must be, on its device."""
    keys = ready.run.refiner
    assert ready.val is not None
    return eval_batches(
        ready.val,
        EvalSettings(keys.model.img_size, keys.data.eval_crop_ratio),
        batch=keys.data.eval_batch or ready.batch.micro_batch,
        rank=world.rank,
        world_size=world.size,
        workers=keys.data.workers,
        on_bad_sample=keys.data.on_bad_sample,
        decode=keys.data,
    ).handed_over(world.device)
