"""Trains while ten minutes pass wherever they may: ``patience_script.py REPORT PLACE STEP arguments of train.py …``.

The clock that heartbeat and watchdog read leaps whenever something begins that may take long, and the watchdog looks
every twenty seconds of that time. REPORT gets a line each time, with the name of what took so long. At PLACE in STEP

    forward       ten minutes pass as well, which no ordinary step may take
    evaluation    the run is asked to stop
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from refiner_ds import train
from refiner_ds.data.batch import Batch
from refiner_ds.training import heartbeat, loop, validation, watchdog
from refiner_ds.training.checkpoints import Checkpoints
from refiner_ds.training.engine import Engine
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.profiling import Profiling
from refiner_ds.training.step import OptimizerStep
from refiner_ds.training.world import World

LEAP_SECONDS, LOOK_SECONDS = 600, 20

report, place, the_step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
passed = 0.0  # seconds that the clock has leapt
watched: list[watchdog.Watchdog] = []
first_steps: set[int] = set()  # since the loop last started


def now() -> float:
    return time.monotonic() + passed


def leap(what: str) -> None:
    """Let ten minutes pass in what this process does now."""
    global passed
    if threading.current_thread() is not threading.main_thread():
        return
    with report.open("a") as lines:
        lines.write(f"{what}\n")
    for _ in range(LEAP_SECONDS // LOOK_SECONDS):
        passed += LOOK_SECONDS
        for one in watched:
            one._look(now())


def takes_long(owner: Any, name: str, what: str, when: Callable[..., bool] = lambda *given, **more: True) -> None:
    """Let ten minutes pass before a function, each time that ``when`` says so of its arguments."""
    original = getattr(owner, name)

    def slow(*given: Any, **more: Any) -> Any:
        if when(*given, **more):
            leap(what)
        return original(*given, **more)

    setattr(owner, name, slow)


def begins_to_watch(self: watchdog.Watchdog) -> None:
    """In place of the watchdog's thread, which would look by another clock."""
    watched.append(self)
    self._ended.wait()


def starts_from(self: heartbeat.Heartbeat, step: int) -> None:
    first_steps.clear()
    first_steps.update(range(step + 1, step + 1 + heartbeat.FIRST_STEPS))
    original_start(self, step)


def batches(ready: Preparation, world: World, step: int) -> Iterator[Batch]:
    """Ten minutes pass before the first batch of an epoch, and before the first since the loop started."""
    for number, batch in enumerate(original_batches(ready, world, step)):
        if number == 0 or (step + number) % ready.schedule.steps_an_epoch == 0:
            leap("first batch")
        yield batch


def asked(self: validation.Validation, step: int, which: str) -> Callable[[], bool]:
    """Ten minutes pass in each of an evaluation's first two batches."""
    asks, batch = original_asked(self, step, which), 0

    def slow() -> bool:
        nonlocal batch
        batch += 1
        if place == "evaluation" and step == the_step and batch == 4:
            self._stop.ask("the test asks")
        found = asks()
        if batch <= 2:
            leap("first batches of an evaluation")
        return found

    return slow


clock = {name: getattr(time, name) for name in ("sleep", "strftime")}
heartbeat.time = watchdog.time = SimpleNamespace(monotonic=now, **clock)  # type: ignore[assignment]
watchdog.Watchdog._watch = begins_to_watch  # type: ignore[method-assign]
original_start, heartbeat.Heartbeat.starts_from = heartbeat.Heartbeat.starts_from, starts_from  # type: ignore
original_batches, loop.train_batches_of = loop.train_batches_of, batches  # type: ignore[attr-defined]
original_asked, validation.Validation._asked_to_stop = validation.Validation._asked_to_stop, asked  # type: ignore

takes_long(Engine, "__init__", "start")
takes_long(OptimizerStep, "_forward", "first step", lambda self, *rest: self._heartbeat.now.step in first_steps)
takes_long(Checkpoints, "begin", "save")
takes_long(Checkpoints, "outcome", "end of a save", lambda self, wait=False: wait)
takes_long(Checkpoints, "load", "load")
takes_long(Metrics, "picture", "picture")
takes_long(Profiling, "finish", "profile")
takes_long(Engine, "full_weights", "weights to evaluate")
if place == "forward":
    takes_long(OptimizerStep, "_forward", "ordinary step", lambda self, *rest: self._heartbeat.now.step == the_step)

if __name__ == "__main__":
    sys.exit(train.main(sys.argv[4:]))
