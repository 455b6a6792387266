"""The submission itself: one at a time a run folder, from the last check to the job's number.

lock ─▶ no job of the run has come meanwhile ─▶ snapshot ─▶ sbatch ─▶ snapshot and run folder are the job's ─▶ unlock
"""

from __future__ import annotations

import fcntl
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import submitit

from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from . import checks, local
from .allocation import Allocation
from .attempts import take_ownership
from .batch import Executor
from .job import TrainJob
from .registry import register
from .snapshot import Snapshot, prune
from .supervisor import Job


@contextmanager
def submission_lock(run_folder: RunFolder) -> Iterator[None]:
    """Keep other submissions of the run away.

    Raises:
        LaunchError: another is under way.
    """
    run_folder.jobs.mkdir(parents=True, exist_ok=True)
    with (run_folder.jobs / ".submission.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{run_folder}: another submission of this run is under way; see jobs.py status"
            ) from None
        except OSError:
            pass  # a file system without locks: the owner, which each start checks, is what is left
        yield


def submit(allocation: Allocation, *, dependency: str = "", exclude: str = "") -> submitit.Job[Any]:
    """Submit a run that passed its checks to Slurm.

    Args:
        dependency: as sbatch takes it: afterok:12.
        exclude: nodes the job must not have.
    Raises:
        LaunchError: another submission came first, or Slurm refuses.
    """
    run_folder = RunFolder(allocation.run.folder)
    with submission_lock(run_folder):
        checks.refuse_unfinished(run_folder)
        snapshot = Snapshot(allocation.run, _job(allocation))
        try:
            job = Executor(allocation, exclude=exclude, dependency=dependency).send(_task(allocation))
        except BaseException:
            snapshot.discard()
            raise
        prune(run_folder)
        snapshot.assign(job.job_id)
        take_ownership(run_folder, job.job_id)
    register(run_folder)
    return job


def start_here(allocation: Allocation) -> tuple[submitit.Job[Any], local.LocalExecutor]:
    """Start a run that passed its checks on this machine."""
    run_folder = RunFolder(allocation.run.folder)
    executor = local.LocalExecutor(
        run_folder,
        tasks=allocation.world_size,
        devices=",".join(local.visible_devices()[: allocation.world_size]) if allocation.gpus else "",
        environment=allocation.profile.environment,
        minutes=allocation.profile.minutes,
        signal_seconds=allocation.profile.signal_seconds,
    )
    with submission_lock(run_folder):
        snapshot = Snapshot(allocation.run, _job(allocation))
        try:
            job = executor.submit(_task(allocation))
            prune(run_folder)
            take_ownership(run_folder, job.job_id)
            snapshot.assign(job.job_id)  # last: the controller waits for it
        except BaseException:
            snapshot.discard()
            raise
    register(run_folder)
    return job, executor


def _job(allocation: Allocation) -> dict[str, object]:
    least = allocation.min_nodes or allocation.nodes
    job = Job(allocation.profile, allocation.nodes, allocation.tasks, allocation.gpus, least)
    return {**job.to_json(), "local": allocation.local, "command": shlex.join(sys.argv)}


def _task(allocation: Allocation) -> TrainJob:
    workers = allocation.run.refiner.data.workers > 0
    return TrainJob(str(allocation.run.folder), allocation.gpus > 0, workers, allocation.profile)
