"""Saving and loading checkpoints, together on all ranks. What lies on disk is in checkpoint/files.py."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from refiner_ds.checkpoint.files import integrity_errors, newest_valid, write_manifest
from refiner_ds.errors import CheckpointError
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import STATE, RunFolder, State, read_state
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.world import World


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: the run folder.
        keep: newest checkpoints kept.
    """

    def __init__(self, folder: RunFolder, keep: int, world: World) -> None:
        self._run = folder
        self._folder = folder.checkpoints
        self._keep = keep
        self._world = world

    def save(self, engine: Engine, ema: ModelEma, state: State, config: dict[str, Any]) -> Path | None:
        """Write one checkpoint, together on all ranks, and make it the latest.

        Returns:
            its folder; None where a weight is not finite: nobody could go on from that, and nothing is written.
        """
        weights, averaged = engine.full_weights(), ema.state_dict()
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            return None
        final = self._run.checkpoint(state.step)
        writing = final.with_name(f".writing_{final.name}")
        if self._world.is_main:
            for left in self._folder.glob(".writing_*"):
                shutil.rmtree(left)
            writing.mkdir(parents=True)
        self._world.barrier()
        engine.engine.save_checkpoint(str(writing), tag="deepspeed", client_state={}, save_latest=False)
        self._world.barrier()  # every rank's part is on disk
        if self._world.is_main:
            buffers = {key: buffer.cpu().clone() for key, buffer in engine.statistics().items()}
            save_file({**weights, **buffers}, writing / "model.safetensors")
            save_file(averaged, writing / "ema.safetensors")
            (writing / "config.json").write_text(json.dumps(config, indent=2))
            (writing / STATE).write_text(json.dumps(asdict(state), indent=2))
            write_manifest(writing)
            if final.exists():
                shutil.rmtree(final)
            os.replace(writing, final)
            write_atomically(self._run.latest_file, final.name + "\n")
            # Later ones were passed over as damaged when the run resumed; they take no good one's place.
            saved = self._run.saved_checkpoints()
            for old in saved[: saved.index(final) + 1][: -self._keep]:
                # On NFS a folder cannot go while somebody evaluates what is in it; it goes with the next save.
                shutil.rmtree(old, ignore_errors=True)
        self._world.barrier()
        return final

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint, the same on every rank; None where a run has none yet.

        Raises:
            CheckpointError: there are some, all damaged: beginning anew is for a person to decide.
        """
        found, fault = (newest_valid(self._run), None) if self._world.is_main else (None, None)
        if self._world.is_main and found is None:
            fault = next((integrity_errors(folder)[0] for folder in reversed(self._run.saved_checkpoints())), None)
        found, fault = self._world.broadcast((found, fault))
        if fault:
            raise CheckpointError(f"{fault}; no checkpoint is whole: delete {self._folder} to begin again at step 0")
        return found

    def load(self, folder: Path, engine: Engine, ema: ModelEma) -> State:
        """Put a checkpoint back. Every rank must call it.

        Raises:
            CheckpointError: DeepSpeed's part is not there.
        """
        state = read_state(folder)
        loaded, _ = engine.engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:  # DeepSpeed's word for "not there"
            raise CheckpointError(f"{folder}: DeepSpeed finds nothing to load; delete it to use the checkpoint before")
        ema.load_state_dict(load_file(folder / "ema.safetensors"))
        return state
