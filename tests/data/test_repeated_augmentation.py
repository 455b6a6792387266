"""Repeated augmentation: a drawn image comes in several views, exactly so often, in the same steps on any ranks."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from refiner_ds.config import load
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.data.sampler import BatchIndices, TrainSampler
from tests.data.conftest import views

COUNT, BATCH, REPEATS = 100, 24, 3  # the batch divides by the repeats, the set and the epoch by neither
PLAIN = views(8, crop_scale=(0.5, 1.0))


def step_of(step: int, world: int, micro: int, repeats: int = REPEATS, batch: int = BATCH) -> BatchIndices:
    """One whole step, put together from all ranks and micro-batches."""
    parts: list[BatchIndices] = []
    for rank in range(world):
        sampler = TrainSampler(COUNT, batch, micro, rank, world, 5, repeats)
        first = step * sampler.micro_batches_per_step
        parts += [sampler[first + number] for number in range(sampler.micro_batches_per_step)]
    return BatchIndices(
        np.concatenate([part.samples_B for part in parts]),
        np.concatenate([part.valid_B for part in parts]),
        sum(part.padded for part in parts),
        np.concatenate([part.views_B for part in parts]),
    )


@pytest.mark.parametrize("world, micro", [(1, 8), (2, 4), (2, 12), (3, 8), (8, 3)])
def test_steps_do_not_depend_on_the_ranks(world: int, micro: int) -> None:
    for step in range(17):  # over the ends of epochs and of a permutation
        one, other = step_of(step, 1, BATCH), step_of(step, world, micro)
        assert one.samples_B.tolist() == other.samples_B.tolist() and one.views_B.tolist() == other.views_B.tolist()
        assert one.padded == other.padded


@pytest.mark.parametrize("repeats, batch", [(1, 24), (2, 24), (3, 24), (3, 25), (4, 30), (7, 25)])
def test_each_image_comes_so_often_in_as_many_epochs_and_no_view_twice(repeats: int, batch: int) -> None:
    steps = -(-COUNT // batch)
    for permutation in range(2):
        seen: list[tuple[int, int]] = []
        for epoch in range(permutation * repeats, (permutation + 1) * repeats):
            for step in range(steps):
                indices = step_of(epoch * steps + step, 1, batch, repeats, batch)
                unpadded = positions_of(batch, repeats) + step * batch < COUNT
                assert indices.padded == (~unpadded).sum()
                pairs = zip(indices.samples_B[unpadded].tolist(), indices.views_B[unpadded].tolist(), strict=True)
                seen += pairs
        assert len(set(seen)) == len(seen) == repeats * COUNT
        assert np.bincount([sample for sample, _ in seen]).tolist() == [repeats] * COUNT


def positions_of(batch: int, repeats: int) -> np.ndarray:
    """The order of drawing at each place of a step, as one says it: every R-th first, then the next ones."""
    return np.concatenate([np.arange(copy, batch, repeats) for copy in range(repeats)])


def test_the_views_of_an_image_are_in_one_batch_and_far_apart() -> None:
    samples = step_of(0, 1, BATCH).samples_B
    assert len(set(samples)) == BATCH // REPEATS
    for sample in samples:
        assert np.diff(np.flatnonzero(samples == sample)).tolist() == [BATCH // REPEATS] * (REPEATS - 1)


def test_without_repeats_order_and_views_are_those_of_before() -> None:
    sampler = TrainSampler(COUNT, BATCH, 8, 1, 3, 5)
    assert [sampler[17].samples_B.tolist(), sampler[17].views_B.tolist()] == [[32, 58, 53, 36, 85, 87, 72, 31], [3] * 8]


def test_a_run_stopped_in_an_epoch_goes_on_with_the_same_views(digits: ShardIndex) -> None:
    def batches(step: int, steps: int, workers: int = 0) -> list[torch.Tensor]:
        loaded = train_batches(
            digits, PLAIN, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, seed=5, position=step * BATCH,
            workers=workers, repeats=REPEATS,
        )  # fmt: skip
        return [batch.images_BHWC for batch in islice(loaded, steps)]

    undisturbed, third = batches(0, 5), BATCH // REPEATS
    for stop, workers in ((0, 0), (2, 2), (3, 0)):
        for found, wanted in zip(batches(stop, 2, workers), undisturbed[stop : stop + 2], strict=True):
            assert torch.equal(found, wanted)
    for number in range(third):
        copies = [undisturbed[0][number + third * copy] for copy in range(REPEATS)]
        assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])


def test_the_run_file_asks_for_it() -> None:
    run = load(None, ["refiner.recipe.aug_repeats=3"])
    assert run.refiner.recipe.aug_repeats == 3 and load(None).refiner.recipe.aug_repeats == 1
