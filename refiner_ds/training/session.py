"""One process's life in a run: join the others, train, say what to do next, leave in order."""

from __future__ import annotations

import json
import os
import sys

from refiner_ds.training.checkpoints import write_atomically
from refiner_ds.training.console import Console, log, write_logs
from refiner_ds.training.loop import FINISHED, Training
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.signals import stop_flag
from refiner_ds.training.world import World, join, leave


def take_part(ready: Preparation) -> int:
    """Train ``ready`` together with the other processes of the group. Returns the exit code."""
    with stop_flag() as stop:
        world = join()
        write_logs(ready.run.folder, world.rank)
        log.info("rank %d of %d is process %d on %s", world.rank, world.size, os.getpid(), os.uname().nodename)
        _greet(ready, world)
        training = Training(ready, world, stop)
        try:
            code = training.go()
        finally:
            training.close()
        if code == FINISHED and world.leads:
            _farewell(ready)
        leave()
    return code


def _greet(ready: Preparation, world: World) -> None:
    console = Console(world.leads)
    where = f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type.upper()}"
    console.say(f"{ready.run.refiner.model.name}, {ready.train.count:,} images, {where}")
    console.say(f"{ready.batch}; {ready.schedule.steps_an_epoch} steps an epoch, {ready.schedule.total_steps} in all")
    console.say(f"run folder {ready.run.folder}")
    if world.leads:
        write_atomically(ready.run.folder / "config.json", json.dumps(ready.run.resolved(), indent=2) + "\n")
    world.barrier()


def _farewell(ready: Preparation) -> None:
    """What was reached and the commands a person types next, as they can be typed from here."""
    folder = ready.run.folder
    summary = json.loads((folder / "complete.json").read_text())
    if "ema" in summary:
        print(
            f"finished: top-1 {summary['model']['top1']:.2f} %, averaged weights {summary['ema']['top1']:.2f} %"
            f" of {summary['ema']['images']} held-out images"
        )
    else:
        print(f"finished after {summary['step']} steps")
    print(f"run folder   {folder}")
    print(f"watch        tensorboard --logdir {folder.parent}")
    print(f"evaluate     {_python()} refiner_ds/evaluate.py {folder}")
    print("go on        the same command with --set refiner.recipe.epochs=…, more than before", flush=True)


def _python() -> str:
    return "python" if sys.prefix == sys.base_prefix else f"{sys.prefix}/bin/python"
