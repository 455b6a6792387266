"""The submission itself: one at a time a run folder, from the last check to the job's number.

lock ─▶ no job of the run has come meanwhile ─▶ snapshot ─▶ sbatch ─▶ snapshot and run folder are the job's ─▶ unlock
"""

from __future__ import annotations

import fcntl
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import submitit

from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from . import checks, local
from .allocation import Allocation
from .attempts import take_ownership
from .batch import Executor
from .job import Task
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


def submit(
    allocation: Allocation,
    *,
    after: Sequence[str] = (),
    besides: Sequence[str] = (),
    dependency: str = "",
    exclude: str = "",
) -> submitit.Job[Any]:
    """Submit a run, or a command on it, that passed its checks to Slurm.

    Args:
        after: jobs of its chain that come before it; it starts when the last of them has finished.
        besides: other jobs of its chain, which may wait or run.
        dependency: another one, as sbatch takes it: afterany:12.
        exclude: nodes the job must not have.
    Raises:
        LaunchError: another submission came first, or Slurm refuses.
    """
    run_folder = RunFolder(allocation.run.folder)
    waits = f"afterok:{after[-1]}" if after else dependency
    with submission_lock(run_folder):
        checks.refuse_unfinished(run_folder, besides=[*after, *besides])
        snapshot = Snapshot(allocation.run, _job(allocation, after))
        try:
            job = Executor(allocation, exclude=exclude, dependency=waits).send(_task(allocation))
        except BaseException:
            snapshot.discard()
            raise
        if allocation.command is None:
            prune(run_folder)
            take_ownership(run_folder, job.job_id)
        snapshot.assign(job.job_id)
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
            if allocation.command is None:
                prune(run_folder)
                take_ownership(run_folder, job.job_id)
            snapshot.assign(job.job_id)  # last: the controller waits for it
        except BaseException:
            snapshot.discard()
            raise
    register(run_folder)
    return job, executor


def _job(allocation: Allocation, after: Sequence[str] = ()) -> dict[str, object]:
    least = allocation.min_nodes or allocation.nodes
    label = allocation.command.label if allocation.command else ""
    job = Job(allocation.profile, allocation.nodes, allocation.tasks, allocation.gpus, least, label)
    known = {**job.to_json(), "local": allocation.local, "command": shlex.join(sys.argv)}
    chain = {"after": after[-1]} if after else {}
    command = allocation.command
    return {**known, **chain, **({"runs": str(command), "typed_in": command.folder} if command else {})}


def _task(allocation: Allocation) -> Task:
    workers = allocation.run.refiner.data.workers > 0
    return Task(str(allocation.run.folder), allocation.gpus > 0, workers, allocation.profile, allocation.command)
