"""A process that could not find the others of its run is refused before it waits for them."""

from __future__ import annotations

import pytest

from refiner_ds.errors import LaunchError
from refiner_ds.training.environment import world_size_of

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_what_launchers_say_is_taken() -> None:
    assert world_size_of({}) == 1 and world_size_of(WHOLE) == 2
    assert world_size_of({"WORLD_SIZE": "1"}) == 1  # alone, it can choose an address itself
    assert world_size_of({**WHOLE, "SLURM_STEP_NUM_TASKS": "2"}) == 2


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_group_that_could_not_meet_is_refused(name: str) -> None:
    for missing in ({key: value for key, value in WHOLE.items() if key != name}, {**WHOLE, name: ""}):
        with pytest.raises(LaunchError, match=f"WORLD_SIZE is 2 and {name} is not set: .*torchrun"):
            world_size_of(missing)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_each_train_alone_are_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="started 4 tasks, and WORLD_SIZE is not set: each would train alone"):
        world_size_of({name: "4"})
    assert world_size_of({name: "1"}) == 1


@pytest.mark.parametrize(
    "wrong, said",
    [({"RANK": "2"}, "RANK is 2, which does not exist where WORLD_SIZE is 2"), ({"WORLD_SIZE": "0"}, "at least 1"),
     ({"RANK": "one"}, "RANK is 'one'; it must be a whole number")],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(wrong: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        world_size_of({**WHOLE, **wrong})
