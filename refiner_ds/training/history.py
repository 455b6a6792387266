"""One line a start in ``history.jsonl``: when, where, from which step, by which code, with which keys changed.

{"time": …, "step": …, "world_size": …, "processes": [{"rank": 0, "host": …, "pid": …}, …], "zero_stage": …,
 "bf16": …, "commit": …, "versions": {"torch": …}, "changed": {"refiner.recipe.weight_decay": [0.05, 0.1]}}
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from refiner_ds.config import RunFile
from refiner_ds.config.differences import changes
from refiner_ds.files import append_line
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.world import World
from refiner_ds.versions import commit

PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "numpy", "safetensors")


def record_start(run: RunFile, world: World, step: int, bf16: bool, before: dict[str, Any] | None) -> dict[str, Any]:
    """Append this start to the run's history. Every rank must call it.

    Args:
        step: optimizer steps already trained.
        bf16: ``bf16.enabled``, resolved for this device.
        before: the resolved run file of the start before; None where this is the first.
    Returns:
        the keys that changed, by dotted path: value before and value now.
    """
    processes = world.gather({"rank": world.rank, "host": platform.node(), "pid": os.getpid()})
    changed = {} if before is None else dict(changes(before, run.resolved()))
    if world.is_main:
        line = {
            "time": time.time(),
            "step": step,
            "world_size": world.size,
            "processes": processes,
            "device": world.device.type,
            "zero_stage": run.keys.zero_optimization.stage,
            "bf16": bf16,
            "commit": commit(),
            "versions": _versions(),
            "changed": changed,
        }
        append_line(RunFolder(run.folder).history, json.dumps(line))
    return changed


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
