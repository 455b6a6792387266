"""The plan of a run file with its model, steps and data; without data where the file says how many images there are."""

from __future__ import annotations

from typing import Any

from refiner_ds.cache import cache_folder
from refiner_ds.config import RunFile
from refiner_ds.errors import DataError
from refiner_ds.gpus import gpu
from refiner_ds.plan.kept import MICRO_BATCHES, kept_on_disk
from refiner_ds.plan.machines import Machines
from refiner_ds.plan.planning import make_plan
from refiner_ds.plan.sized import interpreter_bytes
from refiner_ds.step_times import read_step_times
from refiner_ds.training.build import training_flops
from refiner_ds.training.preparation import load_index
from refiner_ds.training.schedule import Schedule

__all__ = ["full_plan", "plan_for"]


def full_plan(run: RunFile, machines: Machines, largest: bool = True) -> dict[str, Any]:
    """The plan, and under "run" what the run file comes to.

    Args:
        largest: as of `make_plan`.
    Raises:
        ConfigError: the batch does not divide over the processes.
        DataError: the number of classes is known to neither run file nor index.
    """
    if machines.gpu is None:
        interpreter_bytes()  # imports what training imports before anything is traced
    batch = run.batch(machines.processes)
    images, classes, data = _data_of(run)
    schedule = None if images is None else Schedule(run.refiner.recipe, batch, images)
    plan = make_plan(run, machines, classes, images, largest, read_step_times(run))
    plan["run"] = {
        "model": run.refiner.model.name,
        "img_size": run.refiner.model.img_size,
        "flops_an_image": training_flops(run, classes),
        "batch": str(batch),
        "images": images,
        "steps_an_epoch": schedule and schedule.steps_an_epoch,
        "lr": schedule and schedule.peak,
        "data": data,
        "folder": str(run.folder),
    }
    return plan


def plan_for(run: RunFile, machines: dict[str, Any]) -> dict[str, Any]:
    """What a launcher asks before every submission: a plan for the machines it describes, as quickly as may be.

    Args:
        machines: the fields of `Machines`, the GPU by name.
    """
    card = None if machines["gpu"] is None else gpu(machines["gpu"])
    with kept_on_disk(cache_folder() / MICRO_BATCHES):
        return full_plan(run, Machines(**{**machines, "gpu": card}), largest=False)


def _data_of(run: RunFile) -> tuple[int | None, int, str]:
    """Images, classes and description of the training set, from its index or from the run file."""
    images, classes = run.refiner.data.images, run.refiner.model.num_classes
    try:
        index = load_index(run.refiner.data.train, run)
        images, classes, data = index.count, classes or len(index.classes), index.describe()
    except DataError as error:
        data = f"not here: {error}"
    if classes is None:
        raise DataError(f"{run.path}: set refiner.model.num_classes, since the training data is {data}")
    return images, classes, data
