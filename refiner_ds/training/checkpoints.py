"""Saving and loading checkpoints, together on all ranks. What lies on disk is in checkpoint_files.py."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from refiner_ds.errors import CheckpointError
from refiner_ds.training.averages import Averages
from refiner_ds.training.checkpoint_files import (
    State,
    faults,
    newest_whole,
    read_state,
    write_atomically,
    write_manifest,
)
from refiner_ds.training.engine import Engine
from refiner_ds.training.world import World


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

    def save(self, engine: Engine, averages: Averages, state: State, config: dict[str, Any]) -> Path | None:
        """Write one checkpoint, together on all ranks, and make it the latest.

        Returns:
            its folder; None where a weight is not finite: nobody could go on from that, and nothing is written.
        """
        weights, averaged = engine.full_weights(), averages.state()
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            return None
        name = f"step_{state.step:08d}"
        writing, final = self._folder / f".writing_{name}", self._folder / name
        if self._world.leads:
            for left in self._folder.glob(".writing_*"):
                shutil.rmtree(left)
            writing.mkdir(parents=True)
        self._world.barrier()
        engine.engine.save_checkpoint(str(writing), tag="deepspeed", client_state={}, save_latest=False)
        self._world.barrier()  # every rank's part is on disk
        if self._world.leads:
            buffers = {key: buffer.cpu().clone() for key, buffer in engine.statistics().items()}
            save_file({**weights, **buffers}, writing / "model.safetensors")
            save_file(averaged, writing / "ema.safetensors")
            (writing / "config.json").write_text(json.dumps(config, indent=2))
            (writing / "state.json").write_text(json.dumps(asdict(state), indent=2))
            write_manifest(writing)
            if final.exists():
                shutil.rmtree(final)
            os.replace(writing, final)
            write_atomically(self._run / "latest", name + "\n")
            # Later ones were passed over as damaged when the run resumed; they take no good one's place.
            sound = sorted(folder for folder in self._folder.glob("step_*") if folder.name <= name)
            for old in sound[: -self._keep]:
                # On NFS a folder cannot go while somebody evaluates what is in it; it goes with the next save.
                shutil.rmtree(old, ignore_errors=True)
        self._world.barrier()
        return final

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint, the same on every rank; None where a run has none yet.

        Raises:
            CheckpointError: there are some, all damaged: beginning anew is for a person to decide.
        """
        found, fault = (newest_whole(self._folder), None) if self._world.leads else (None, None)
        if self._world.leads and found is None:
            fault = next((faults(folder)[0] for folder in sorted(self._folder.glob("step_*"), reverse=True)), None)
        found, fault = self._world.say((found, fault))  # type: ignore[misc]
        if fault:
            raise CheckpointError(f"{fault}; no checkpoint is whole: delete {self._folder} to begin again at step 0")
        return found

    def load(self, folder: Path, engine: Engine, averages: Averages) -> State:
        """Put a checkpoint back. Every rank must call it.

        Raises:
            CheckpointError: DeepSpeed's part is not there.
        """
        state = read_state(folder)
        loaded, _ = engine.engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:  # DeepSpeed's word for "not there"
            raise CheckpointError(f"{folder}: DeepSpeed finds nothing to load; delete it to use the checkpoint before")
        averages.load(load_file(folder / "ema.safetensors"))
        return state
