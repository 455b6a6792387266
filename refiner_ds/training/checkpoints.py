"""Checkpoints that are complete or not there.

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
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refiner_ds.errors import CheckpointError
from refiner_ds.training.averages import Averages
from refiner_ds.training.engine import Engine
from refiner_ds.training.world import World

MANIFEST = "complete.json"


@dataclass(frozen=True)
class State:
    """Where a run stands; with the run file, everything random follows from it."""

    step: int
    samples: int
    epoch: float
    world_size: int


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: the run folder.
        keep: newest checkpoints kept.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self._run = folder
        self._folder = folder / "checkpoints"
        self._keep = keep
        self._world = world

    def save(self, engine: Engine, averages: Averages, state: State, config: dict[str, Any]) -> Path:
        """Write one checkpoint, together on all ranks, and make it the latest. Returns its folder."""
        name = f"step_{state.step:08d}"
        writing, final = self._folder / f".writing_{name}", self._folder / name
        if self._world.leads:
            for left in self._folder.glob(".writing_*"):
                shutil.rmtree(left)
            writing.mkdir(parents=True)
        self._world.barrier()
        engine.engine.save_checkpoint(str(writing), tag="deepspeed", client_state={}, save_latest=False)
        weights, averaged = engine.full_weights(), averages.state()
        self._world.barrier()  # every rank's part is on disk
        if self._world.leads:
            buffers = {key: buffer.cpu().clone() for key, buffer in engine.statistics().items()}
            save_file({**weights, **buffers}, writing / "model.safetensors")
            save_file(averaged, writing / "ema.safetensors")
            (writing / "config.json").write_text(json.dumps(config, indent=2))
            (writing / "state.json").write_text(json.dumps(asdict(state), indent=2))
            _write_manifest(writing)
            if final.exists():
                shutil.rmtree(final)
            os.replace(writing, final)
            write_atomically(self._run / "latest", name + "\n")
            for old in sorted(self._folder.glob("step_*"))[: -self._keep]:
                shutil.rmtree(old)
        self._world.barrier()
        return final

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint, the same on every rank; None where there is none."""
        found: str | None = None
        if self._world.leads:
            for folder in sorted(self._folder.glob("step_*"), reverse=True):
                if not faults(folder):
                    found = str(folder)
                    break
        said = self._world.say(found)
        return Path(str(said)) if said else None

    def load(self, folder: Path, engine: Engine, averages: Averages) -> State:
        """Put a checkpoint back. Every rank must call it.

        Raises:
            CheckpointError: it was written by another number of processes.
        """
        state = read_state(folder)
        if state.world_size != self._world.size:
            raise CheckpointError(
                f"{folder}: was written by {state.world_size} processes and this run has {self._world.size};"
                f" start it with {state.world_size}"
            )
        loaded, _ = engine.engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:  # DeepSpeed's word for "not there"
            raise CheckpointError(f"{folder}: DeepSpeed finds nothing to load; delete it to use the checkpoint before")
        averages.load(load_file(folder / "ema.safetensors"))
        return state


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


def find_checkpoint(place: Path) -> Path:
    """The checkpoint a user means: a checkpoint folder, or a run folder's latest.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if (place / "state.json").is_file():
        folder = place
    elif (place / "latest").is_file():
        folder = place / "checkpoints" / (place / "latest").read_text().strip()
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


def _write_manifest(folder: Path) -> None:
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
