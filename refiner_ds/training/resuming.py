"""Whether a run folder can be continued by a run file: all that can be said before anything is written."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from refiner_ds.checkpoint.files import CLASSES, integrity_errors, read_classes
from refiner_ds.checkpoint.tensors import TensorReader
from refiner_ds.checkpoint.writing import free_bytes, no_room
from refiner_ds.config import RunFile
from refiner_ds.config.sections import forbidden_change
from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.run_folder import RunFolder

SMALL = 1 << 20  # bytes; the weights of a checkpoint are read once, when it is loaded


def config_before(run: RunFolder) -> dict[str, Any] | None:
    """The resolved run file of the start before, from the run folder or from its newest readable checkpoint.

    Returns:
        None where the folder holds no run.
    Raises:
        ConfigError: it holds one, and nothing says with which run file it was begun.
    """
    if (keys := run.resolved()) is not None:
        return keys
    if not run.config.exists() and not run.saved_checkpoints():
        return None
    raise ConfigError(
        f"{run.config}: is damaged, and no checkpoint has a copy of it: bring back the run file, or choose another"
        " refiner.run.name to begin a new run"
    )


def refuse_another_run(run: RunFile) -> None:
    """Raise ConfigError where the run folder holds a run that this run file would not continue."""
    before = config_before(RunFolder(run.folder))
    if before is not None and (change := forbidden_change(before, run.resolved())) is not None:
        key, old, new = change
        raise ConfigError(
            f"{run.folder}: holds a run with {key} {json.dumps(old)}, not {json.dumps(new)};"
            " choose another refiner.run.name to begin a new one"
        )


def refuse_unfit_checkpoint(run: RunFolder, shapes: dict[str, torch.Size], classes: list[str]) -> None:
    """Raise CheckpointError where the newest readable checkpoint is not of this model or these classes.

    Any number of processes, ZeRO stage and precision will do; whether it is whole is looked at when it is loaded.

    Args:
        shapes: of the model's weights and running statistics, by name.
    """
    newest = _newest_readable(run)
    if newest is None:
        return
    folder, weights = newest
    for name in dict.fromkeys([*shapes, *weights.names()]):
        here = tuple(weights.shape(name)) if name in weights else "nothing"
        there = tuple(shapes[name]) if name in shapes else "nothing"
        if here != there:
            raise CheckpointError(
                f"{folder}: holds {here} of {name} and the model {there}; bring back the code or the run file it was"
                " written by, or choose another refiner.run.name to begin a new run"
            )
    known = read_classes(folder) if (folder / CLASSES).is_file() else classes
    if known != classes:
        place = next((n for n, pair in enumerate(zip(known, classes, strict=False)) if pair[0] != pair[1]), None)
        differ = (
            f"class {place} was {known[place]} and is {classes[place]}"
            if place is not None
            else f"there were {len(known)} classes and are {len(classes)}"
        )
        raise CheckpointError(f"{folder}: {differ}; set refiner.data.train to what it was, or another refiner.run.name")


def refuse_full_disk(run: RunFolder, needed: int) -> None:
    """Raise ConfigError where a run folder's disk has no room for one checkpoint."""
    free = free_bytes(run.path)
    if free < needed:
        raise ConfigError(f"{no_room(run.path, needed, free)}; free some, or set refiner.run.output to another disk")


def _newest_readable(run: RunFolder) -> tuple[Path, TensorReader] | None:
    for folder in reversed(run.saved_checkpoints()):
        if not integrity_errors(folder, SMALL):
            with suppress(CheckpointError):
                return folder, TensorReader(folder, "model")
    return None
