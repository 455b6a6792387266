"""Times a run's first steps for the planner (refiner_ds/step_times.py), which then knows this machine."""

from __future__ import annotations

import os
import time
from statistics import median

from refiner_ds.step_times import StepTime, keep_step_time
from refiner_ds.training.console import log
from refiner_ds.training.machine import device_name
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.step import Outcome
from refiner_ds.training.world import World
from refiner_ds.versions import code_hash

__all__ = ["StepTiming"]

WARM_UP, TIMED = 10, 40  # steps of a process: the first ones compile, fill caches and wait for workers to start


class StepTiming:
    """Takes the main process's steps after its first ten, and keeps their median once there are forty."""

    def __init__(self, ready: Preparation, world: World) -> None:
        self._ready, self._world = ready, world
        self._seen = 0
        self._seconds: list[float] = []
        self._waits: list[float] = []

    def add(self, outcome: Outcome) -> None:
        """Take in a step."""
        self._seen += 1
        if not self._world.is_main or self._seen <= WARM_UP or self._seen > WARM_UP + TIMED:
            return
        self._seconds.append(outcome.seconds)
        self._waits.append(outcome.data_wait_seconds)
        if len(self._seconds) == TIMED:
            self._keep()

    def _keep(self) -> None:
        batch, world = self._ready.batch, self._world
        measured = StepTime(
            device=device_name(world.device),
            nodes=world.size // int(os.environ.get("LOCAL_WORLD_SIZE") or world.size),
            processes=world.size,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            classes=self._ready.num_classes,
            seconds=median(self._seconds),
            data_wait_seconds=median(self._waits),
            code=code_hash(),
            date=time.strftime("%Y-%m-%d"),
        )
        try:
            keep_step_time(self._ready.run, measured)
        except OSError as error:  # the planner has its lower bound then
            log.info("the step's time is not kept for the planner (%s)", error)
