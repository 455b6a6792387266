"""What a checkpoint is on disk, for whoever reads one; no process group, no engine.

    checkpoints/
      .writing_step_00001000/   while being written; swept away by the next save
      step_00001000/
        model.safetensors       fp32 weights and running statistics, whole, under the model's names
        ema.safetensors         the same of the EMA
        optimizer.safetensors   AdamW's moments, exp_avg/<name> and exp_avg_sq/<name>, fp32
        classes.json            names of the classes, in the order of the model's outputs
        config.json             the resolved run file
        data.json               what the run is trained on, by place and content
        state.json              step, samples, epoch, number of processes, optimizer's own count of steps
        complete.json           size and sha256 of every file above; written last
    latest                      name of the newest complete one, replaced atomically

One form for every number of processes, ZeRO stage and precision. Of a large model each rank writes a part of the names;
see tensors.py for how the files are then called.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from refiner_ds.checkpoint.tensors import TensorReader
from refiner_ds.errors import CheckpointError
from refiner_ds.files import sha256_of
from refiner_ds.run_folder import MANIFEST, STATE, RunFolder

CONFIG = "config.json"
CLASSES = "classes.json"
DATA = "data.json"


def newest_valid(run: RunFolder) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; None where there is none."""
    return next((folder for folder in reversed(run.saved_checkpoints()) if not integrity_errors(folder)), None)


def integrity_errors(folder: Path, hashed: float = math.inf) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when it is whole.

    Args:
        hashed: bytes up to which a file is read; of a larger one the size alone is looked at.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        files = {folder / name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except OSError:
        return [f"{folder / MANIFEST}: missing; the checkpoint was never finished"]
    except (ValueError, TypeError, AttributeError):
        return [f"{folder / MANIFEST}: damaged; it does not list the checkpoint's files"]
    if folder / STATE not in files:
        return [f"{folder / MANIFEST}: damaged; it does not list {STATE}"]
    wrong = []
    for file, (size, digest) in files.items():
        if not file.is_file():
            wrong.append(f"{file}: missing")
        elif file.stat().st_size != size:
            wrong.append(f"{file}: {file.stat().st_size} bytes where {size} were written")
        elif size <= hashed and sha256_of(file) != digest:
            wrong.append(f"{file}: its bytes are not the ones written")
    return wrong


def skipped(run: RunFolder, used: Path) -> list[str]:
    """What is wrong with each checkpoint of a run that is later than the one in use, a line each."""
    saved = run.saved_checkpoints()
    return [errors[0] for errors in map(integrity_errors, saved[saved.index(used) + 1 :]) if errors]


def find_checkpoint(place: Path) -> Path:
    """The checkpoint a user means: a checkpoint folder, or a run folder's latest.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if (place / STATE).is_file() or (place / MANIFEST).is_file() and (place / "model.safetensors").is_file():
        folder = place
    elif (named := RunFolder(place).latest_checkpoint()) is not None:
        folder = named
    elif not place.exists():
        raise CheckpointError(f"{place}: does not exist; give a run folder or a checkpoint folder in it")
    elif RunFolder(place).config.is_file():
        raise CheckpointError(f"{place}: the run has no checkpoint yet; let it train to its first, or give another run")
    else:
        raise CheckpointError(f"{place}: holds no checkpoint; give a run folder or a checkpoint folder in it")
    if wrong := integrity_errors(folder):
        raise CheckpointError(f"{wrong[0]}; give another checkpoint")
    return folder


def read_weights(folder: Path, which: str) -> dict[str, Tensor]:
    """Whole fp32 weights and running statistics of a checkpoint.

    Args:
        which: "ema" or "model".
    Raises:
        CheckpointError: they cannot be read.
    """
    tensors = TensorReader(folder, which)
    return {name: tensors[name] for name in tensors.names()}


def read_classes(folder: Path) -> list[str]:
    """Names of the classes a checkpoint was trained on, in the order of the model's outputs."""
    names = read_json(folder / CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / CLASSES}: is no list of names; give another checkpoint")
    return names


def read_json(file: Path) -> Any:
    """What a checkpoint's JSON file holds.

    Raises:
        CheckpointError: it is not there or not JSON.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); give another checkpoint") from None
