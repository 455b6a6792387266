"""Every name in a run folder: the contract between launching, training, resuming, evaluating and plotting.

    <output>/<name>/
      config.json                 resolved run file
      history.jsonl               one line a start: when, where, by what, with which keys changed
      attention.json              which backend computes which attention, on which machine
      data.json                   what the run is trained on, by place and content
      metrics.jsonl               one line a log interval or evaluation
      divergence.json             steps that went wrong, and what was done about them
      complete.json               what a finished run reached
      checkpoints/step_00001000/  complete or absent; the files in one are listed in refiner_ds/checkpoint/files.py
      latest                      name of the newest complete checkpoint, replaced atomically
      tensorboard/                events and images
      logs/                       rank_N.log, one file a rank; rank_N.stacks, should it hang
      heartbeats/  lock           which processes train here, and that they still do
      profiles/step_00000100/     traces of profiled steps; a file named profile asks a live run for one
      jobs/  code/                submitted runs: submitit's files, and the source they run
      evaluation/                 what evaluate.py and calibrate.py found, a folder a checkpoint and way of looking
      gallery.html                pictures of the run, from python -m refiner_ds.gallery
      export/                     model.safetensors, config.json, model card

Nothing here imports torch.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.files import read_object

STATE, MANIFEST = "state.json", "complete.json"  # in a checkpoint
CALIBRATION = "calibration.json"  # in a folder of evaluation results
STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class State:
    """Where a run stands; with the run file, everything random follows from it.

    Attributes:
        step: optimizer steps.
        samples: samples consumed, padding included.
        epoch: a fraction.
        world_size: processes that wrote the checkpoint.
        optimizer_steps: steps the optimizer counts, for its bias correction: those that were not skipped.
        skipped_steps: steps left out because of gradients that were not finite.
    """

    step: int
    samples: int
    epoch: float
    world_size: int
    optimizer_steps: int = 0
    skipped_steps: int = 0


def read_state(checkpoint: Path) -> State:
    """Where the run stood when a checkpoint was written. Raises CheckpointError where its file is damaged."""
    found = read_object(checkpoint / STATE) or {}
    try:
        return State(**found)
    except TypeError:
        raise CheckpointError(f"{checkpoint / STATE}: is missing or damaged; give another checkpoint") from None


class RunFolder:
    """The paths of one run folder; none of them need exist.

    Args:
        path: <output>/<name>.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.history = self.path / "history.jsonl"
        self.attention = self.path / "attention.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.divergence = self.path / "divergence.json"
        self.complete = self.path / "complete.json"
        self.checkpoints = self.path / "checkpoints"
        self.latest_file = self.path / "latest"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.heartbeats = self.path / "heartbeats"
        self.lock = self.path / "lock"
        self.profiles = self.path / "profiles"
        self.profile_request = self.path / "profile"
        self.jobs = self.path / "jobs"
        self.code = self.path / "code"
        self.evaluation = self.path / "evaluation"
        self.export = self.path / "export"

    def refuse_unwritable(self) -> None:
        """Raise ConfigError where the run folder cannot be made or written."""
        standing = self.path
        while not standing.exists() and standing != standing.parent:
            standing = standing.parent
        try:
            with tempfile.TemporaryFile(dir=standing):  # asking for permission is not enough: root has it everywhere
                pass
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ConfigError(
                f"{self.path}: cannot be written ({standing}: {why}); set refiner.run.output to a folder that can"
            ) from None

    def refuse_misplaced(self) -> None:
        """Raise ConfigError where a folder stands in the place of a file that a run writes, or the reverse."""
        files = (self.config, self.history, self.attention, self.data, self.metrics, self.divergence, self.complete,
                 self.latest_file, self.lock, *self.logs.glob("rank_*"))  # fmt: skip
        for file in files:
            if file.is_dir():
                raise ConfigError(f"{file}: is a folder where a run keeps a file; move it elsewhere")
        for folder in (self.checkpoints, self.tensorboard, self.logs, self.heartbeats, self.profiles):
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"{folder}: is a file where a run keeps a folder; move it elsewhere")

    def __str__(self) -> str:
        return str(self.path)

    def resolved(self) -> dict[str, Any] | None:
        """The resolved run file of the last start, or the copy in the newest checkpoint that has one; None without."""
        checkpoints = reversed(self.saved_checkpoints())
        for file in (self.config, *(folder / self.config.name for folder in checkpoints)):
            keys = read_object(file)
            if keys is not None and isinstance(keys.get("refiner"), dict):
                return keys
        return None

    def trained_on(self) -> dict[str, Any] | None:
        """What the run is trained on, by place and content, or the copy in the newest checkpoint that has one.

        None without, as before the first checkpoint, and in runs whose checkpoints are older than that copy.
        """
        checkpoints = reversed(self.saved_checkpoints())
        for file in (self.data, *(folder / self.data.name for folder in checkpoints)):
            found = read_object(file)
            if found is not None and _is_set(found.get("train")) and _is_set(found.get("maps") or found["train"]):
                return found
        return None

    def reached(self) -> dict[str, Any] | None:
        """What a finished run reached, by ``complete.json``; None where it has not finished or the file is damaged."""
        found = read_object(self.complete)
        return found if found is not None and isinstance(found.get("step"), int) else None

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of an optimizer step is."""
        return self.checkpoints / f"step_{step:08d}"

    def profile(self, step: int) -> Path:
        """Where the traces of profiled steps are, by the first of them."""
        return self.profiles / f"step_{step:08d}"

    def results(self, step: int, weights: str) -> Path:
        """Where results of the weights ("ema" or "model") of an optimizer step are."""
        return self.evaluation / f"step_{step:08d}_{weights}"

    def saved_checkpoints(self) -> list[Path]:
        """Every checkpoint of the run, unchecked, oldest first."""
        found = [folder for folder in self.checkpoints.glob("step_*") if STEP.fullmatch(folder.name)]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that ``latest`` names, unchecked; None where there is none.

        Where ``latest`` is missing or damaged, or what it names is gone: the newest that was written to its end.
        """
        named = None
        with suppress(OSError, ValueError):
            name = self.latest_file.read_text().strip()
            named = self.checkpoints / name if STEP.fullmatch(name) else None
        if named is not None and named.is_dir():
            return named
        whole = [folder for folder in self.saved_checkpoints() if (folder / MANIFEST).is_file()]
        return whole[-1] if whole else named

    def rank_log(self, rank: int) -> Path:
        """The log file of one rank."""
        return self.logs / f"rank_{rank}.log"

    def rank_stacks(self, rank: int) -> Path:
        """Where one rank writes the Python stacks of its threads, should it hang."""
        return self.logs / f"rank_{rank}.stacks"


def _is_set(described: Any) -> bool:
    return isinstance(described, dict) and all(
        isinstance(described.get(key), str) for key in ("place", "content_sha256")
    )
