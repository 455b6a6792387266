"""What a process holds beside activations, and that no more is asked of DeepSpeed than is used."""

from __future__ import annotations

import pytest

from refiner_ds.config import load
from refiner_ds.training.engine import deepspeed_config
from refiner_ds.training.model_states import REDUCE_BUCKET, model_states

SET = ["zero_optimization.reduce_bucket_size=7"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("trained", "keys", "elements"), [(1000, [], 1000), (0, [], 1), (10**9, [], REDUCE_BUCKET), (1000, SET, 7)]
)
def test_a_bucket_is_no_larger_than_what_can_fill_it(trained: int, keys: list[str], elements: int, stage: int) -> None:
    run = load(None, [f"zero_optimization.stage={stage}", *keys])
    asked = deepspeed_config(run, run.batch(2), False, trained)["zero_optimization"].get("reduce_bucket_size")
    planned = model_states(run.keys.zero_optimization, trained, frozen=5, bf16=True, world_size=2).buckets
    assert planned == (2 * elements if stage else 0)
    assert asked == elements or not stage
