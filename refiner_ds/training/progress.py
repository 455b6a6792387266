"""What a run tells while it trains: a line of metrics an interval, and the progress line of the console."""

from __future__ import annotations

import os
from typing import Any

from refiner_ds.attention import describe_backend
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import Console
from refiner_ds.training.engine import Engine
from refiner_ds.training.interval import Interval, Utilisation, peak_memory_gib
from refiner_ds.training.intervals import is_logged
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.step import Outcome
from refiner_ds.training.step_timing import StepTiming
from refiner_ds.training.stragglers import Stragglers, data_advice
from refiner_ds.training.world import World

ADVICE_STEPS = 20  # an interval of fewer says nothing about a rank or its loader
ETA_STEPS = 50  # of this process, after which the end is estimated once for good


class Progress:
    """Collects the outcomes of steps and tells of them.

    Args:
        step: optimizer steps already trained.
    """

    def __init__(self, ready: Preparation, world: World, engine: Engine, console: Console, step: int) -> None:
        self._schedule, self._batch = ready.schedule, ready.batch
        self._world, self._engine, self._console = world, engine, console
        self._every = ready.run.refiner.run.log_steps
        self._began_at = step
        self._interval = Interval()
        self._grad_norm: float | None = None
        self._stragglers, self._timing = Stragglers(), StepTiming(ready, world)
        self._workers, self._advised = ready.run.refiner.data.workers, False
        self._utilisation = Utilisation(ready.run, ready.num_classes, world)
        self._numbers: dict[str, Any] = {}
        self.metrics = Metrics(RunFolder(ready.run.folder) if world.is_main else None, step)

    def after(self, step: int, outcome: Outcome) -> None:
        """Take in the ``step``-th step, counted from 1; write its interval's numbers where that ends here."""
        if not outcome.skipped:
            self._interval.add(outcome)
            self._timing.add(outcome)
            self._grad_norm = outcome.grad_norm
        logged = is_logged(step, self._every, self._schedule.total_steps)
        if logged:
            self.write(step)
            self.metrics.scalars({f"grad_norm/{part}": norm for part, norm in outcome.grad_norms.items()}, step)
        trained = step - self._began_at
        self._console.count(trained)
        if trained == 1 and "(" in (backend := describe_backend(self._world.device)):
            self._console.print(f"attention: {backend}")  # what it could not compute itself is known only now
        if trained == ETA_STEPS:
            self._console.print(f"after {ETA_STEPS} steps: {self._console.end(step, trained)}")
        if self._numbers:
            self._console.progress(step, trained, self._fields(step), logged)

    def stalled(self, seconds: float) -> None:
        """Count that training has waited for a checkpoint; it shows in the next line."""
        self._interval.checkpoint_seconds += seconds

    def write(self, step: int) -> dict[str, Any]:
        """Write the numbers of the interval that ends with ``step``; returns the last that were written."""
        if self._interval.steps:
            samples = step * self._batch.global_batch
            numbers = self._interval.numbers(self._batch.global_batch)
            self._report_slow_ranks(numbers)
            self._numbers = {
                **numbers,
                "lr": self._schedule.lr(samples - self._batch.global_batch),
                "grad_norm": self._grad_norm,
                "peak_memory_gib": peak_memory_gib(self._world.device),
                "mfu": self._utilisation.mfu(numbers["images_per_second"]),
                "skipped_steps": self._engine.skipped_steps,
            }
            self.metrics.write("train", step, self._schedule.epoch(samples), samples, **self._numbers)
            self._interval = Interval()
        return self._numbers

    def rewind(self, step: int) -> None:
        """Forget what was logged beyond ``step``: the run has gone back to it."""
        self._interval = Interval()
        self.metrics.rewind(step)

    def _report_slow_ranks(self, numbers: dict[str, float]) -> None:
        if self._interval.steps < ADVICE_STEPS:
            return
        for sentence in self._stragglers.judge(self._world.gather(self._interval.rank_time(self._world))):
            self._console.print(sentence)
        cores = len(os.sched_getaffinity(0))
        advice = data_advice(numbers["step_seconds"], numbers["data_wait_seconds"], self._workers, cores)
        if advice and not self._advised:
            self._advised = True
            self._console.print(advice)

    def close(self) -> None:
        """Write out what is buffered."""
        self.metrics.close()

    def _fields(self, step: int) -> dict[str, str]:
        epochs = self._schedule.total_steps / self._schedule.steps_an_epoch
        return {
            "epoch": f"{self._schedule.epoch_shown(step / self._schedule.steps_an_epoch)}/{epochs:.4g}",
            "step": f"{step}/{self._schedule.total_steps}",
            "loss": f"{self._numbers['loss']:.4f}",
            "lr": f"{self._numbers['lr']:.2e}",
            "images/s": f"{self._numbers['images_per_second']:.0f}",
        }
