"""Writing a checkpoint folder so that it is complete or not there, whatever happens meanwhile.

sweep .writing_*  →  .writing_step_…/ files, each hashed on its way  →  complete.json  →  rename  →  latest
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from refiner_ds.checkpoint.files import MANIFEST
from refiner_ds.checkpoint.retention import Retention, Saved
from refiner_ds.checkpoint.tensors import Written
from refiner_ds.errors import CheckpointError
from refiner_ds.files import fsync_folder, is_full, sha256_of, write_atomically
from refiner_ds.run_folder import RunFolder, read_state


def checkpoint_bytes(shapes: Iterable[torch.Size]) -> int:
    """About how many bytes a checkpoint takes: weights, their EMA and two moments, in fp32, and some for the rest."""
    return 4 * 4 * sum(shape.numel() for shape in shapes) + (1 << 20)


def free_bytes(place: Path) -> int:
    """Free bytes of the disk that a folder, or what it will be made in, lies on."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def no_room(place: Path, needed: int, free: int) -> str:
    """The sentence for a disk that is too full."""
    though = "" if free < needed else " (a quota, or the number of files)"
    return f"{place}: a checkpoint needs {needed:,} bytes and finds no room, with {free:,} bytes free{though}"


class Draft:
    """A checkpoint that is being written.

    Args:
        run: its run folder.
        step: optimizer steps at its time.
        needed: bytes it will take.
    """

    def __init__(self, run: RunFolder, step: int, needed: int) -> None:
        self._run, self._needed = run, needed
        self._final = run.checkpoint(step)
        self.folder = self._final.with_name(f".writing_{self._final.name}")
        self.files: dict[str, Written] = {}

    def open(self) -> None:
        """Sweep away what earlier saves left behind and make the folder.

        Raises:
            OSError: there is not room enough, or the folder cannot be made.
        """
        for left in self._run.checkpoints.glob(".writing_*"):
            shutil.rmtree(left)
        if free_bytes(self._run.path) < self._needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.folder.mkdir(parents=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a small file."""
        write_atomically(self.folder / name, json.dumps(content, indent=2))
        self.files[name] = Written((self.folder / name).stat().st_size, sha256_of(self.folder / name))

    def publish(self) -> Path:
        """List the files, give the checkpoint its name and make it the latest.

        Raises:
            OSError: it cannot be written, or a file is not as long as what was written to it.
        """
        for name, written in self.files.items():
            if (self.folder / name).stat().st_size != written.size:
                raise OSError(errno.EIO, f"{name} is not as long as what was written to it")
        write_atomically(self.folder / MANIFEST, json.dumps(self.files, indent=2))
        fsync_folder(self.folder)
        if self._final.exists():
            shutil.rmtree(self._final)
        os.replace(self.folder, self._final)
        fsync_folder(self._final.parent)
        write_atomically(self._run.latest_file, self._final.name + "\n")
        return self._final

    def discard(self) -> None:
        """Leave nothing of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def failure(self, error: OSError) -> str:
        """The sentence for a save that failed."""
        if is_full(error):
            return no_room(self._final, self._needed, free_bytes(self._run.path))
        return f"{self._final}: cannot be written ({error.strerror or error})"


def remove_old(run: RunFolder, newest: Path, retention: Retention, values: Mapping[int, float]) -> None:
    """Remove the checkpoints that are not to be kept now that ``newest`` is saved.

    Later ones were skipped as damaged when the run resumed; they take no good one's place and are left alone.

    Args:
        values: the retention's metric by step.
    """
    folders = run.saved_checkpoints()
    states: dict[Path, Saved | None] = {}
    for folder in folders[: folders.index(newest) + 1]:
        try:
            state = read_state(folder)
            states[folder] = Saved(state.step, state.epoch)
        except CheckpointError:
            states[folder] = None  # half removed before, or damaged beyond use
    kept = retention.kept([saved for saved in states.values() if saved], values)
    for folder, saved in states.items():
        if saved is None or saved.step not in kept:
            # On NFS a folder cannot go while somebody evaluates what is in it; it goes with the next save.
            shutil.rmtree(folder, ignore_errors=True)
