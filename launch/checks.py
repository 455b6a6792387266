"""What can be known to be wrong before a job is submitted. Every check refuses in one sentence and writes nothing.

A job may wait in the queue for a day; a typing mistake found then has cost a day.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from refiner_ds.config.addresses import has_secrets, is_address, redacted
from refiner_ds.errors import LaunchError

from . import local, slurm
from .allocation import Allocation
from .snapshot import ROOT

CODE_SECONDS = 300  # importing torch from a cold shared file system takes its time


def check_resources(allocation: Allocation) -> None:
    """Refuse a job that already runs, or that asks this machine for GPUs it has not."""
    if not allocation.local:
        active = slurm.unfinished_job(allocation.run.folder)
        if active:
            number = active.partition(" ")[0]
            raise LaunchError(
                f"{allocation.run.folder}: belongs to job {active}; wait for it, or end it with scancel {number}"
            )
    elif allocation.gpus and allocation.world_size > len(local.visible_devices()):
        have = len(local.visible_devices())
        raise LaunchError(
            f"this machine has {have} GPUs for {allocation.world_size} processes; --gpus-per-node 0 uses its CPU"
        )


def check_ready(allocation: Allocation, overrides: list[str], root: Path = ROOT) -> None:
    """Refuse what the job itself would refuse when it starts: ``refiner_ds/train.py --ready``, by this clone's code.

    That is: code that does not import, a model that does not build, data that is missing, a run folder that cannot be
    written, holds another run, a complete one, or one of another number of processes. Packaged sets are made if they
    are not there. With data on a server it is ``--check``: only the nodes can say whether they reach it.
    """
    data = allocation.run.refiner.data
    for key, place in (("train", data.train), ("val", data.val)):
        if place and has_secrets(place):
            raise LaunchError(
                f"refiner.data.{key} {redacted(place)}: the job's files would hold its password or query string;"
                " write it as ${NAME}, an environment variable that the job has"
            )
    remote = [place for place in (data.train, data.val) if place and is_address(place)]
    sets = [word for override in overrides for word in ("--set", override)]
    command = (
        *(sys.executable, str(root / "refiner_ds" / "train.py"), "--check" if remote else "--ready"),
        *("--world-size", str(allocation.world_size), "--config", str(allocation.run.path.absolute()), *sets),
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CODE_SECONDS)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{root}: its code has not finished --ready within {CODE_SECONDS} s; run it by hand"
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if said.startswith("error: "):
            raise LaunchError(said.removeprefix("error: "))
        raise LaunchError(f"{root}: the code does not run: {said}")
