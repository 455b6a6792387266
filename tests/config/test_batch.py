"""The global batch is the recipe; what does not divide is refused with what would."""

from __future__ import annotations

import pytest

from refiner_ds.config.batch import split_batch
from refiner_ds.errors import ConfigError


@pytest.mark.parametrize(
    "world, micro, plan", [(1, None, (48, 1)), (4, None, (12, 1)), (2, 8, (8, 3)), (3, 16, (16, 1))]
)
def test_accumulation_follows_from_the_number_of_processes(
    world: int, micro: int | None, plan: tuple[int, int]
) -> None:
    batch = split_batch(48, micro, world)
    assert (batch.micro_batch, batch.accumulation) == plan
    assert batch.world_size * batch.micro_batch * batch.accumulation == 48


@pytest.mark.parametrize(
    "world, micro, named",
    [
        (5, None, "45 and 50, or start 4 or 6 processes"),
        (100, None, "is 100, or start 48 processes"),
        (2, 32, "is 64, or set train_micro_batch_size_per_gpu to 24"),
        (4, 8, "or start 3 or 6 processes, or set train_micro_batch_size_per_gpu to 6"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(world: int, micro: int | None, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        split_batch(48, micro, world)
    assert named in str(refusal.value)


def test_the_last_batch_of_an_epoch_is_a_step_too() -> None:
    assert split_batch(48, None, 2).steps(97) == 3
