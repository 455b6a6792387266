"""Step times that runs have measured, for the planner: ``<cache>/steps/<configuration>-<place>.json``. No torch.

The configuration is what a run file says of the work in a micro-batch; the place is the device, the processes and how
the batch is split over them. A newer measurement of the same replaces the one before. A damaged file is no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refiner_ds.cache import cache_folder
from refiner_ds.config import RunFile
from refiner_ds.files import read_object, write_atomically

__all__ = ["StepTime", "keep_step_time", "read_step_times", "step_time_files"]

# What a step's time does not depend on, or what StepTime says itself.
LEFT_OUT = {"init_from", "init_layers", "reset_head", "num_classes", "attention"}
# Of DeepSpeed's keys and of the recipe, those that it does depend on.
DEEPSPEED = {
    "zero_optimization", "bf16", "data_types", "activation_checkpointing", "gradient_clipping",
    "communication_data_type",
}  # fmt: skip
RECIPE = {"cls_weight", "dense_weight", "mix_token"}


@dataclass(frozen=True)
class StepTime:
    """A step as a run took it.

    Attributes:
        device: as its driver names it; of a CPU, its model.
        nodes, processes: of the run; ``processes`` in all.
        micro_batch, accumulation: images a process computes at once, and how often in a step.
        classes: of the model.
        seconds: median step, waiting for data included.
        data_wait_seconds: median part of it that the main process spent waiting for data.
        code: hash of the package's code.
        date: year-month-day.
    """

    device: str
    nodes: int
    processes: int
    micro_batch: int
    accumulation: int
    classes: int
    seconds: float
    data_wait_seconds: float
    code: str
    date: str

    def place(self) -> str:
        """A hash of where it was measured, for a file name."""
        split = (self.nodes, self.processes, self.micro_batch, self.accumulation, self.classes)
        return _hash([self.device, *split])


def keep_step_time(run: RunFile, measured: StepTime) -> None:
    """Keep what a run has measured.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = _folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_configuration(run)}-{measured.place()}.json"
    write_atomically(file, json.dumps(asdict(measured)), writer=str(os.getpid()))


def step_time_files(run: RunFile) -> list[Path]:
    """Files of measurements of this run file's work, on whatever machines."""
    return sorted(_folder(run).glob(f"{_configuration(run)}-*.json"))


def read_step_times(run: RunFile) -> list[StepTime]:
    """What other runs, or earlier starts of this one, have measured of this run file's work, the newest first."""
    found = []
    for file in step_time_files(run):
        if (read := _read(read_object(file))) is not None:
            found.append(read)
    return sorted(found, key=lambda one: one.date, reverse=True)


def _read(kept: dict[str, Any] | None) -> StepTime | None:
    with suppress(TypeError):
        read = StepTime(**(kept or {}))
        kinds = StepTime.__annotations__
        good = all(type(value).__name__ == kinds[name] for name, value in asdict(read).items())
        if good and read.seconds > 0 and min(read.nodes, read.processes, read.accumulation) > 0:
            return read
    return None


def _folder(run: RunFile) -> Path:
    return cache_folder(run.refiner.data.cache) / "steps"


def _configuration(run: RunFile) -> str:
    keys = run.refiner
    return _hash(
        {
            **run.keys.model_dump(mode="json", include=DEEPSPEED),
            "model": keys.model.model_dump(mode="json", exclude=LEFT_OUT),
            "attention": os.environ.get("REFINER_ATTENTION") or keys.model.attention,
            "recipe": keys.recipe.model_dump(mode="json", include=RECIPE),
        }
    )


def _hash(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
