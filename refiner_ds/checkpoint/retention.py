"""Which checkpoints a run keeps: the newest, the best by a metric, and one every so many epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Saved(NamedTuple):
    """A checkpoint as retention sees it: optimizer steps and epochs at its time."""

    step: int
    epoch: float


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        newest: so many of the newest, at least one.
        best: so many of the best beside them, by ``metric``.
        metric: weights and metric of an evaluation, e.g. "ema/top1"; the best loss is the smallest.
        every_epochs: the first checkpoint at or after each multiple of so many epochs is kept for good; None: none.
    """

    newest: int
    best: int = 0
    metric: str = "ema/top1"
    every_epochs: float | None = None

    def kept(self, saved: Sequence[Saved], values: Mapping[int, float]) -> set[int]:
        """Steps of the checkpoints to keep.

        Args:
            saved: all there are, oldest first.
            values: the metric by step, where an evaluation of that step is known.
        """
        rising = not self.metric.endswith("loss")
        rated = sorted(
            (one.step for one in saved if one.step in values),
            key=lambda step: (values[step] if rising else -values[step], step),
        )
        kept = {one.step for one in saved[-self.newest :]}
        kept |= set(rated[len(rated) - self.best :]) if self.best else set()
        return kept | self._milestones(saved)

    def _milestones(self, saved: Sequence[Saved]) -> set[int]:
        if self.every_epochs is None:
            return set()
        found, before = set(), 0
        for one in saved:
            passed = math.floor(one.epoch / self.every_epochs + 1e-9)
            if passed > before:
                found.add(one.step)
                before = passed
        return found
