"""A run that leaves the good path is stopped or led back, by all ranks alike, and what was wrong is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from refiner_ds.training.divergence import DivergenceGuard, Incidents, MicroBatch, named, suspects

STEADY = [2.0 + 0.01 * (step % 5) for step in range(60)]


def test_what_is_not_finite_is_wrong_from_the_first_step_on() -> None:
    guard = DivergenceGuard(None, 100)
    assert guard.judge(math.nan, 1.0) == "the loss is nan"
    assert guard.judge(1.0, math.inf) == "the gradient norm is inf"
    assert guard.judge(1.0, None) is None  # DeepSpeed does not always tell one


def test_a_spike_is_judged_by_the_steps_before_it_and_does_not_become_one_of_them() -> None:
    guard = DivergenceGuard(6.0, 50)
    assert [guard.judge(9.0 if step == 3 else loss, 1.0) for step, loss in enumerate(STEADY[:10])] == [None] * 10
    guard = DivergenceGuard(6.0, 50)
    assert {guard.judge(loss, 1.0 + loss) for loss in STEADY} == {None}
    for _ in range(3):
        said = guard.judge(4.0, 3.0)
        assert said and said.startswith("the loss is 4, ") and "σ above its last 50 steps" in said
    assert (guard.judge(2.0, 40.0) or "").startswith("the gradient norm is 40, ")
    assert DivergenceGuard(None, 50).judge(1e9, 1e9) is None
    assert guard.judge(0.1, 0.1) is None  # a fall is no spike


def test_those_to_blame_are_the_broken_ones_or_the_highest() -> None:
    found = [MicroBatch(rank, micro, 1.0 + rank + micro, [f"key{rank}{micro}"]) for rank in (0, 1) for micro in (0, 1)]
    assert suspects(found) == [found[-1]]
    broken = MicroBatch(1, 0, math.nan, [f"n{number}" for number in range(10)])
    assert suspects([*found, broken]) == [broken]
    assert named([*found, broken]) == "rank 1, micro-batch 0, loss nan: n0, n1, n2, n3, n4, n5, n6, n7 and 2 more"


def test_a_step_that_goes_wrong_twice_is_left_out_and_one_that_does_not_was_the_hardwares_fault(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "divergence.json", 3)
    found = [MicroBatch(1, 0, math.nan, ["a", "b"])]
    assert incidents.wrong(7, "the loss is nan", found).verdict is None and not incidents.left_out(7)
    incidents.write()
    incidents = Incidents(tmp_path / "divergence.json", 3)  # a later start goes on with it
    assert incidents.wrong(7, "the loss is nan", found).verdict == "persistent"
    assert incidents.left_out(7) and incidents.fine(7) is None and incidents.may_go_back()
    assert incidents.wrong(9, "the loss is nan", found).verdict is None
    once = incidents.fine(9)
    assert once and once.verdict == "transient" and not incidents.left_out(9) and not incidents.may_go_back()
    incidents.write()
    again = Incidents(tmp_path / "divergence.json", 3)
    assert again.left_out(7) and not again.left_out(9) and again.rollbacks == 3
    kept = json.loads((tmp_path / "divergence.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert kept["incidents"][0]["suspects"] == [{"rank": 1, "micro": 0, "loss": "nan", "keys": ["a", "b"]}]


@pytest.mark.parametrize("step", [1, 8])
def test_a_run_without_incidents_leaves_nothing_out(step: int, tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "divergence.json", 3)
    assert not incidents.left_out(step) and incidents.fine(step) is None
