"""When something that happens now and then in a run is due: every so many epochs, steps or minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def falls_into(step: int, every: float) -> bool:
    """Whether a multiple of ``every`` steps, perhaps a fraction, falls into this step, counted from 1."""
    return math.floor(step / every) > math.floor((step - 1) / every)


def is_logged(step: int, every: int, total: int) -> bool:
    """Whether the numbers of ``step``, counted from 1, become a line of metrics: each ``every`` steps, and the last."""
    return step == total or step % every == 0


class SaveTimes:
    """When checkpoints are due by steps.

    Args:
        epochs, steps: between checkpoints; None: not for that reason.
        steps_an_epoch: of the schedule.
    """

    def __init__(self, epochs: float | None, steps: int | None, steps_an_epoch: int) -> None:
        of_epochs = None if epochs is None else epochs * steps_an_epoch
        self._every = [every for every in (of_epochs, steps) if every is not None]

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` optimizer steps is to be saved."""
        return any(falls_into(step, every) for every in self._every)


class Alarm:
    """Rings once so many minutes have gone by since it was set; never where they are None.

    Ranks' clocks differ: one of them asks, and all act on it in the same step.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._clock = clock
        self._set_at = clock()

    def rings(self) -> bool:
        """Whether the minutes have gone by."""
        return self._clock() - self._set_at >= self._seconds

    def reset(self) -> None:
        """Begin again."""
        self._set_at = self._clock()
