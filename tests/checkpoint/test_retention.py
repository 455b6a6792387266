"""Which checkpoints stay: the newest, the best by a metric, and one every so many epochs."""

from __future__ import annotations

import pytest

from refiner_ds.checkpoint.retention import Retention, Saved

SAVED = [Saved(step, step / 10) for step in (5, 10, 15, 20, 25, 30, 35, 40)]
TOP1 = {10: 61.0, 20: 70.0, 30: 65.0, 40: 70.0}


@pytest.mark.parametrize(
    "retention, kept",
    [
        (Retention(3), {30, 35, 40}),
        (Retention(1, best=1), {40}),  # of equal ones the later
        (Retention(1, best=2), {20, 40}),
        (Retention(2, best=3), {20, 30, 35, 40}),
        (Retention(1, best=9), {10, 20, 30, 40}),  # a step that was not evaluated is never the best
        (Retention(1, best=1, metric="model/loss"), {10, 40}),
        (Retention(1, every_epochs=1), {10, 20, 30, 40}),
        (Retention(1, every_epochs=1.2), {15, 25, 40}),  # the first at or after 1.2, 2.4 and 3.6
        (Retention(1, best=1, every_epochs=3), {30, 40}),
    ],
)
def test_the_newest_the_best_and_the_milestones_are_kept(retention: Retention, kept: set[int]) -> None:
    assert retention.kept(SAVED, TOP1) == kept


def test_milestones_stay_what_they_are_when_what_lay_between_is_gone() -> None:
    retention = Retention(1, every_epochs=1)
    left = [one for one in SAVED if one.step in retention.kept(SAVED[:5], {})] + SAVED[5:]
    assert retention.kept(left, {}) == {10, 20, 30, 40}
