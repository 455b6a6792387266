"""What can be known to be wrong before a job is submitted. Every check refuses in one sentence and writes nothing.

A job may wait in the queue for a day; a typing mistake found then has cost a day.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from refiner_ds.config import RunFile
from refiner_ds.config.reading import REMOTE
from refiner_ds.errors import LaunchError

from . import local, slurm
from .plan import Plan
from .snapshot import ROOT

CODE_SECONDS = 300  # importing torch from a cold shared file system takes its time


def check_run_folder(run: RunFile) -> None:
    """Refuse a run folder that cannot be made or written."""
    standing = run.folder
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    try:
        with tempfile.TemporaryFile(dir=standing):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise LaunchError(
            f"{run.folder}: cannot be written ({standing}: {why}); say where results may go with refiner.run.output"
        ) from None


def check_machines(plan: Plan) -> None:
    """Refuse a job that already runs, or that asks this machine for GPUs it has not."""
    if not plan.local:
        active = slurm.unfinished_job(plan.run.folder)
        if active:
            number = active.partition(" ")[0]
            raise LaunchError(
                f"{plan.run.folder}: belongs to job {active}; wait for it, or end it with scancel {number}"
            )
    elif plan.gpus and plan.world_size > len(local.devices_here()):
        have = len(local.devices_here())
        raise LaunchError(
            f"this machine has {have} GPUs for {plan.world_size} processes; --gpus-per-node 0 uses its CPU"
        )


def check_data(plan: Plan) -> None:
    """Refuse shard sets that are missing, empty or without an index, and a run that has seen all its data already.

    Packaged sets are made if they are not there.
    """
    from refiner_ds.data.index import ShardIndex, find_maps
    from refiner_ds.data.packaged import locate

    data = plan.run.refiner.data
    cache = Path(data.cache) if data.cache else None
    for place in filter(None, (data.train, data.val)):
        if place.startswith(REMOTE) and not place.startswith("package:"):
            continue  # only the nodes can say whether they reach it
        index = ShardIndex.load(locate(place, cache=cache))
        if place == data.train:
            _refuse_complete(plan, index.count)
            if data.score_maps:
                find_maps(index)


def _refuse_complete(plan: Plan, images: int) -> None:
    try:
        trained = json.loads((plan.run.folder / "complete.json").read_text())["step"]
    except FileNotFoundError:
        return
    recipe = plan.run.refiner.recipe
    if trained >= round((recipe.epochs + recipe.cooldown_epochs) * plan.batch.steps(images)):
        raise LaunchError(
            f"{plan.run.folder}: this run is complete, {trained} steps; begin another with --set refiner.run.name=NAME,"
            " or train it further with a larger refiner.recipe.epochs"
        )


def check_code(plan: Plan, overrides: list[str], root: Path = ROOT) -> None:
    """Refuse code that does not import, or a model that does not build, by ``refiner_ds.train --check``."""
    sets = [word for override in overrides for word in ("--set", override)]
    command = (
        *(sys.executable, "-m", "refiner_ds.train", "--check", "--world-size", str(plan.world_size)),
        *("--config", str(plan.run.path.absolute()), *sets),
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=CODE_SECONDS)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{root}: its code has not finished --check within {CODE_SECONDS} s; run it by hand"
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if said.startswith("error: "):
            raise LaunchError(said.removeprefix("error: "))
        raise LaunchError(f"{root}: the code does not run: {said}")
