"""What a checkpoint is on disk, for whoever reads one; no process group, no engine.

    checkpoints/
      .writing_step_00001000/          while being written; swept away by the next save
      step_00001000/
        deepspeed/                     DeepSpeed's own files: weights, optimizer, one part a rank
        model.safetensors              fp32 weights and running statistics, whole
        ema.safetensors                the same of the EMA weights
        config.json                    the resolved run file
        state.json                     step, samples, epoch, number of processes
        complete.json                  size and sha256 of every file above; written last
    latest                             name of the newest complete one, replaced atomically

DeepSpeed writes its own ``latest`` before its last barrier and not atomically; it is not used.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refiner_ds.errors import CheckpointError
from refiner_ds.files import sha256_of, write_atomically
from refiner_ds.run_folder import STATE, RunFolder

CONFIG = "config.json"
MANIFEST = "complete.json"


def newest_valid(run: RunFolder) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; None where there is none."""
    return next((folder for folder in reversed(run.saved_checkpoints()) if not integrity_errors(folder)), None)


def integrity_errors(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return [f"{folder / MANIFEST}: missing or not JSON: the checkpoint was never finished"]
    wrong = []
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{file}: missing")
        elif file.stat().st_size != size:
            wrong.append(f"{file}: {file.stat().st_size} bytes where {size} were written")
        elif sha256_of(file) != digest:
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
    if (place / STATE).is_file():
        folder = place
    elif (named := RunFolder(place).latest_checkpoint()) is not None:
        folder = named
    elif not place.exists():
        raise CheckpointError(f"{place}: does not exist; give a run folder or a checkpoint folder in it")
    else:
        raise CheckpointError(f"{place}: holds no checkpoint; give a run folder or a checkpoint folder in it")
    if wrong := integrity_errors(folder):
        raise CheckpointError(f"{wrong[0]}; give another checkpoint")
    return folder


def read_weights(folder: Path, which: str) -> dict[str, Tensor]:
    """Whole fp32 weights and running statistics of a checkpoint.

    Args:
        which: "ema" or "model".
    """
    try:
        return load_file(folder / f"{which}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}/{which}.safetensors: cannot be read ({error}); give another checkpoint"
        ) from None


def write_manifest(folder: Path) -> None:
    """Bring every file of a checkpoint to the disk and list it; the checkpoint is complete when this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for file in files:
        with open(file, "rb") as bytes_on_disk:
            os.fsync(bytes_on_disk.fileno())
        listed[str(file.relative_to(folder))] = [file.stat().st_size, sha256_of(file)]
    write_atomically(folder / MANIFEST, json.dumps(listed, indent=2))
