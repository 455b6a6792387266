"""One process's life in a run: join the others, train, say what to do next, leave in order."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import refiner_ds
from refiner_ds.training.build import choose_attention
from refiner_ds.training.checkpoint_files import write_atomically
from refiner_ds.training.console import Console, heard_from, log, write_logs
from refiner_ds.training.loop import FINISHED, Training
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.signals import stop_flag
from refiner_ds.training.world import World, join, leave


def take_part(ready: Preparation) -> int:
    """Train ``ready`` together with the other processes of the group. Returns the exit code.

    Raises:
        ConfigError: refined attention cannot be computed here as the run file says.
    """
    with stop_flag() as stop:
        world = join()
        choose_attention(ready.run, world.device)
        write_logs(ready.run.folder, world.rank)
        log.info("rank %d of %d is process %d on %s", world.rank, world.size, os.getpid(), os.uname().nodename)
        _greet(ready, world)
        training = Training(ready, world, stop)
        try:
            with heard_from(world.rank):
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
    bin_folder = Path(sys.executable).parent
    evaluate = Path(refiner_ds.__file__).with_name("evaluate.py")
    print(f"watch        {_typed(bin_folder / 'tensorboard')} --logdir {_typed(folder.parent)}")
    print(f"evaluate     {_typed(sys.executable)} {_typed(evaluate)} {_typed(folder)}")
    print("go on        the same command with --set refiner.recipe.epochs=…, more than before", flush=True)


def _typed(path: Path | str) -> str:
    """A path as it can be typed here: the bare command where the shell finds just that, else seen from this folder."""
    if (found := shutil.which(Path(path).name)) and Path(found) == Path(path):
        return Path(path).name
    return str(path).removeprefix(f"{Path.cwd()}/")
