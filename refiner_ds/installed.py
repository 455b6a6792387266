"""The installed commands: each imports its module when called, and says in a sentence what it lacks.

An installation of the models and the operator alone has the commands too, but not the packages of the extra "train".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

from refiner_ds.exit_codes import REFUSED

__all__ = ["COMMANDS"]

COMMANDS = {
    "train": "refiner_ds.train",
    "evaluate": "refiner_ds.evaluate",
    "calibrate": "refiner_ds.calibrate",
    "classify": "refiner_ds.classify",
    "export": "refiner_ds.export.__main__",
    "submit": "refiner_ds.launch.submit",
    "jobs": "refiner_ds.launch.jobs",
    "sweep": "refiner_ds.launch.sweep",
    "doctor": "refiner_ds.launch.doctor",
    "shard": "refiner_ds.data_tools.shard",
    "annotate": "refiner_ds.data_tools.annotate",
    "verify": "refiner_ds.data_tools.verify",
    "show": "refiner_ds.data_tools.show",
}
# What the packages of the extra "train" are imported as.
TRAIN = {
    "PIL", "deepspeed", "matplotlib", "pydantic", "simplejpeg", "sklearn", "submitit", "tensorboard", "torchvision",
    "tqdm", "webdataset", "xxhash", "yaml", "zstandard",
}  # fmt: skip


def _run(name: str) -> int:
    try:
        return int(import_module(COMMANDS[name]).main() or 0)
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in TRAIN:
            raise
    print(
        f"refiner-{name}: {missing} is missing: install refiner_ds[train], which trains and makes data", file=sys.stderr
    )
    return REFUSED


def __getattr__(name: str) -> Callable[[], int]:
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_run, name)
