"""What can be known to be wrong before a job is submitted. Every check refuses in one sentence and writes nothing.

A job may wait in the queue for a day; a typing mistake found then has cost a day.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.cache import cache_folder
from refiner_ds.config.addresses import has_secrets, is_address, redacted
from refiner_ds.errors import LaunchError
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder
from refiner_ds.step_times import step_time_files

from . import local, planned, slurm
from .allocation import Allocation
from .snapshot import ROOT, sources

READY = ": ready; "  # of train.py --ready, before it plans
CODE_SECONDS = 300  # importing torch from a cold shared file system takes its time
KEPT_SIGNATURES = 200


def check_resources(allocation: Allocation, besides: Sequence[str] = ()) -> None:
    """Refuse a run that has a job, ``besides`` those, that has not ended, or asks for what there cannot be."""
    folder = allocation.run.folder
    if "%" in str(folder):
        raise LaunchError(
            f"{folder}: Slurm and submitit take what follows a % in a path for a job's number and the like; choose"
            " another refiner.run.name or refiner.run.output"
        )
    if not allocation.local:
        refuse_unfinished(RunFolder(folder), besides)
    elif allocation.gpus and allocation.world_size > len(local.visible_devices()):
        have = len(local.visible_devices())
        raise LaunchError(
            f"this machine has {have} GPUs for {allocation.world_size} processes; --gpus-per-node 0 uses its CPU"
        )


def refuse_unfinished(run_folder: RunFolder, besides: Sequence[str] = ()) -> None:
    """Refuse a run folder that belongs to a job which waits or runs, ``besides`` those."""
    for number, state in slurm.unfinished_jobs(run_folder.jobs, besides).items():
        raise LaunchError(
            f"{run_folder}: belongs to job {number} ({state}); wait for it, or end it with scancel {number}"
        )


@dataclass(frozen=True)
class Ready:
    """A run that passed: whether it was checked just now, and its plan, or why none could be made."""

    checked: bool
    plan: dict[str, Any] | None


def check_ready(allocation: Allocation, overrides: list[str], root: Path = ROOT) -> Ready:
    """Refuse what the job itself would refuse when it starts: ``refiner_ds/train.py --ready``, by this clone's code.

    That is: code that does not import, a model that does not build, data that is missing, a run folder that cannot be
    written or has no room, holds another run, or a complete one. Packaged sets are made if they are not there. With
    data on a server it is ``--check``: only the nodes can say whether they reach it. The same process makes the plan.
    Nothing is checked again where nothing that it depends on has changed since it last passed.
    """
    data = allocation.run.refiner.data
    for key, place in (("train", data.train), ("maps", data.maps), ("val", data.val)):
        if place and has_secrets(place):
            raise LaunchError(
                f"refiner.data.{key} {redacted(place)}: the job's files would hold its password or query string;"
                " write it as ${NAME}, an environment variable that the job has"
            )
    remote = any(is_address(place) for place in _data_places(allocation))
    RunFolder(allocation.run.folder).refuse_unwritable()
    if (passed := Passed(signature(allocation, root))).known:
        return Ready(False, passed.plan)
    machines = planned.machines(allocation)
    sets = [word for override in overrides for word in ("--set", override)]
    command = (
        *(sys.executable, str(root / "refiner_ds" / "train.py"), "--check" if remote else "--ready"),
        *("--world-size", str(allocation.world_size), "--config", str(allocation.run.path.absolute()), *sets),
        *(("--plan-for", json.dumps(machines)) if machines else ()),
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CODE_SECONDS)
    except subprocess.TimeoutExpired as late:
        if READY in (late.stdout or b"").decode(errors="replace"):
            return Ready(True, {"failed": f"it had not ended within {CODE_SECONDS} s"})
        raise LaunchError(
            f"{root}: its code has not finished --ready within {CODE_SECONDS} s; run it by hand"
        ) from None
    if done.returncode and READY in done.stdout:  # what came after is the planner's
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Ready(True, {"failed": last.removeprefix("error: ")})
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if said.startswith("error: "):
            raise LaunchError(said.removeprefix("error: "))
        raise LaunchError(f"{root}: the code does not run: {said}")
    plan = planned.read(done.stdout)
    if not remote:
        Passed(signature(allocation, root)).note(plan)  # made anew: the check may have made a packaged set
    return Ready(True, plan)


def signature(allocation: Allocation, root: Path) -> str:
    """A hash of what ``check_ready`` depends on: code, run file, data, environment, processes, what the run has done.

    A run folder's own name is no part of it, nor the seed of a run that has not begun: the seeds of a sweep, or a dry
    run and what follows it, are checked once.
    """
    folder = RunFolder(allocation.run.folder)
    run = allocation.run.resolved()
    done = [_text(file) for file in (folder.config, folder.complete, folder.latest_file)]
    for key in ("name", "output", *(() if any(done) else ("seed",))):  # a run that has begun keeps its seed
        run["refiner"]["run"].pop(key)
    watched = [
        *(file for place in sources(root).values() for file in sorted(place.rglob("*.py"))),
        *(file for place in _data_places(allocation) for file in _data_files(place, allocation)),
        *(Path(place) for place in sys.path if place.endswith("site-packages")),
        *_initial_weights(allocation.run.refiner.model.init_from),
        *step_time_files(allocation.run),
    ]
    known = {
        "run": run,
        "done": done,
        "world": allocation.world_size,
        "machines": planned.machines(allocation),
        "python": sys.executable,
        "files": [_stamp(file) for file in watched],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _data_places(allocation: Allocation) -> list[str]:
    data = allocation.run.refiner.data
    return [place for place in (data.train, data.maps, data.val) if place]


def _data_files(place: str, allocation: Allocation) -> Iterator[Path]:
    """What stands where data is: shards, index, label files; for a packaged set, the folder that it is made in.

    What else there is in the cache, such as times of attention that a run has measured, is none of its business.
    """
    with suppress(OSError):
        if place.startswith("package:"):
            made = cache_folder(allocation.run.refiner.data.cache)
            package, _, part = place.removeprefix("package:").partition("/")
            yield from sorted(made.glob(f"{package}-*/{part}"))
        else:
            yield Path(place)
            yield from sorted(Path(place).iterdir())


def _initial_weights(place: str | None) -> tuple[Path, ...]:
    return (Path(place), Path(place) / "latest") if place else ()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _stamp(file: Path) -> tuple[str, int, int]:
    try:
        found = file.stat()
    except OSError:
        return str(file), -1, -1
    return str(file), found.st_size, found.st_mtime_ns


class Passed:
    """Plans of what passed its checks, by signature, newest last, in the cache folder."""

    def __init__(self, signature: str) -> None:
        self._signature = signature
        self._file = cache_folder() / "checks.json"

    def _all(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            kept = json.loads(self._file.read_text())
            return kept if isinstance(kept, dict) else {}
        return {}

    @property
    def known(self) -> bool:
        """Whether what has this signature passed."""
        return self._signature in self._all()

    @property
    def plan(self) -> dict[str, Any] | None:
        """Its plan."""
        return self._all().get(self._signature)

    def note(self, plan: dict[str, Any] | None) -> None:
        """Remember it; where that cannot be, the check runs again."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            kept = list({**self._all(), self._signature: plan}.items())[-KEPT_SIGNATURES:]
            write_atomically(self._file, json.dumps(dict(kept)), writer=str(os.getpid()))
