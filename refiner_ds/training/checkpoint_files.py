"""What a checkpoint is on disk, for whoever reads one; no process group, no engine.

    checkpoints/
      .writing_step_00001000/          while being written; swept away by the next save
      step_00001000/
        deepspeed/                     DeepSpeed's own files: weights, optimizer, one part a rank
        model.safetensors              fp32 weights and running statistics, whole
        ema.safetensors                the same of the averaged weights
        config.json                    the resolved run file
        state.json                     step, samples, epoch, number of processes
        complete.json                  size and sha256 of every file above; written last
    latest                             name of the newest complete one, replaced atomically

DeepSpeed writes its own ``latest`` before its last barrier and not atomically; it is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refiner_ds.errors import CheckpointError

MANIFEST = "complete.json"


@dataclass(frozen=True)
class State:
    """Where a run stands; with the run file, everything random follows from it."""

    step: int
    samples: int
    epoch: float
    world_size: int


def latest(run_folder: Path) -> Path | None:
    """The checkpoint a run folder calls its latest, unchecked; None where there is none."""
    try:
        return run_folder / "checkpoints" / (run_folder / "latest").read_text().strip()
    except OSError:
        return None


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint in a folder that is complete and undamaged; None where there is none."""
    return next((folder for folder in sorted(checkpoints.glob("step_*"), reverse=True) if not faults(folder)), None)


def faults(folder: Path) -> list[str]:
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
        elif _sha256(file) != digest:
            wrong.append(f"{file}: its bytes are not the ones written")
    return wrong


def passed_over(used: Path) -> list[str]:
    """What is wrong with each checkpoint that is later than the one in use, a line each."""
    later = sorted(folder for folder in used.parent.glob("step_*") if folder.name > used.name)
    return [wrong[0] for wrong in map(faults, later) if wrong]


def find_checkpoint(place: Path) -> Path:
    """The checkpoint a user means: a checkpoint folder, or a run folder's latest.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if (place / "state.json").is_file():
        folder = place
    elif (named := latest(place)) is not None:
        folder = named
    elif not place.exists():
        raise CheckpointError(f"{place}: does not exist; give a run folder or a checkpoint folder in it")
    else:
        raise CheckpointError(f"{place}: holds no checkpoint; give a run folder or a checkpoint folder in it")
    if wrong := faults(folder):
        raise CheckpointError(f"{wrong[0]}; give another checkpoint")
    return folder


def read_state(folder: Path) -> State:
    """Where the run stood when a checkpoint was written."""
    return State(**json.loads((folder / "state.json").read_text()))


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


def write_atomically(file: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new."""
    beside = file.with_name(f".{file.name}.writing")
    with open(beside, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)


def write_manifest(folder: Path) -> None:
    """Bring every file of a checkpoint to the disk and list it; the checkpoint is complete when this returns."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for file in files:
        with open(file, "rb") as bytes_on_disk:
            os.fsync(bytes_on_disk.fileno())
        listed[str(file.relative_to(folder))] = [file.stat().st_size, _sha256(file)]
    write_atomically(folder / MANIFEST, json.dumps(listed, indent=2))


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
