"""What a run file comes to, without GPU, and without data where the file says how much there is."""

from __future__ import annotations

import torch

from refiner_ds.config import RunFile
from refiner_ds.errors import DataError
from refiner_ds.training.build import build_model, parameter_count, training_flops
from refiner_ds.training.preparation import load_index
from refiner_ds.training.schedule import Schedule

__all__ = ["check", "data_of"]


def data_of(run: RunFile) -> tuple[int | None, int, str]:
    """Images, classes and description of the training set, from its index or from the run file.

    Raises:
        DataError: the number of classes is known to neither.
    """
    images, classes = run.refiner.data.images, run.refiner.model.num_classes
    try:
        index = load_index(run.refiner.data.train, run)
        images, classes, data = index.count, classes or len(index.classes), index.describe()
    except DataError as error:
        data = f"not here: {error}"
    if classes is None:
        raise DataError(f"{run.path}: set refiner.model.num_classes, since the training data is {data}")
    return images, classes, data


def check(run: RunFile, world_size: int) -> int:
    """Print parameters, batch, steps, and where the data would be; returns 0."""
    batch = run.batch(world_size)
    images, classes, data = data_of(run)
    with torch.device("meta"):
        parameters = parameter_count(build_model(run, classes))
    print(f"{run.path}: fine")
    print(f"model       {run.refiner.model.name} at {run.refiner.model.img_size} px, {parameters:,} parameters")
    print(f"            {training_flops(run, classes) / 1e9:.1f} GFLOP an image, forward and backward")
    print(f"batch       {batch}")
    if images is not None:
        schedule = Schedule(run.refiner.recipe, batch, images)
        print(f"steps       {schedule.steps_an_epoch:,} an epoch of {images:,} images, {schedule.total_steps:,} in all")
        print(f"lr          {schedule.peak:.3g} at its peak")
    else:
        print("steps       unknown: set refiner.data.images, or put the shards where refiner.data.train says")
    print(f"data        {data}")
    print(f"run folder  {run.folder}")
    return 0
