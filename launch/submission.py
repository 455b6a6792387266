"""The submission itself: one at a time a run folder, from the last check to the job's number.

lock ─▶ no job of the run has come meanwhile ─▶ snapshot ─▶ sbatch ─▶ snapshot and run folder are the job's ─▶ unlock
"""

from __future__ import annotations

import errno
import fcntl
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import submitit

from refiner_ds.errors import LaunchError
from refiner_ds.files import is_full
from refiner_ds.run_folder import RunFolder

from . import checks, local, slurm
from .allocation import Allocation
from .attempts import take_ownership
from .batch import Executor
from .job import Task
from .registry import register
from .snapshot import Snapshot, prune
from .supervisor import Job

LOCK = ".submission.lock"


@contextmanager
def submission_lock(run_folder: RunFolder) -> Iterator[None]:
    """Keep other submissions of the run away.

    Raises:
        LaunchError: another is under way, or the run folder cannot be written.
    """
    try:
        run_folder.jobs.mkdir(parents=True, exist_ok=True)
        file = (run_folder.jobs / LOCK).open("w")
    except OSError as error:
        raise _unwritable(run_folder, error) from None
    with file as lock:
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
    with submission_lock(run_folder), _writing(run_folder):
        checks.refuse_unfinished(run_folder, besides=[*after, *besides])
        with _discarded_on_failure(Snapshot(allocation.run, _job(allocation, after))) as snapshot:
            job = Executor(allocation, exclude=exclude, dependency=waits).send(_task(allocation))
            try:
                _hand_over(allocation, run_folder, snapshot, job.job_id)
            except OSError:
                slurm.ask("scancel", job.job_id)  # it would find neither its code nor that the run folder is its own
                raise
    register(run_folder)
    return job


def start_here(allocation: Allocation) -> tuple[submitit.Job[Any], local.LocalExecutor]:
    """Start a run that passed its checks on this machine."""
    run_folder = RunFolder(allocation.run.folder)
    with submission_lock(run_folder), _writing(run_folder):
        executor = local.LocalExecutor(
            run_folder,
            tasks=allocation.world_size,
            devices=",".join(local.visible_devices()[: allocation.world_size]) if allocation.gpus else "",
            environment=allocation.profile.environment,
            minutes=allocation.profile.minutes,
            signal_seconds=allocation.profile.signal_seconds,
        )
        with _discarded_on_failure(Snapshot(allocation.run, _job(allocation))) as snapshot:
            job = executor.submit(_task(allocation))
            try:
                _hand_over(allocation, run_folder, snapshot, job.job_id)
            except OSError:
                executor.controller.kill()  # it only waits for its snapshot
                executor.controller.wait()
                raise
    register(run_folder)
    return job, executor


def _hand_over(allocation: Allocation, run_folder: RunFolder, snapshot: Snapshot, job_id: str) -> None:
    """Make the run folder, if the job trains in it, and the snapshot the job's; the latter last, for which it waits."""
    if allocation.command is None:
        prune(run_folder)
        take_ownership(run_folder, job_id)
    snapshot.assign(job_id)


@contextmanager
def _discarded_on_failure(snapshot: Snapshot) -> Iterator[Snapshot]:
    try:
        yield snapshot
    except BaseException:
        snapshot.discard()
        raise


@contextmanager
def _writing(run_folder: RunFolder) -> Iterator[None]:
    """Raise LaunchError, in one sentence, where a run folder cannot be written; one that is new goes again.

    Held inside the submission's lock: nobody else can be writing there.
    """
    new = [*run_folder.path.iterdir()] == [run_folder.jobs] and [*run_folder.jobs.iterdir()] == [run_folder.jobs / LOCK]
    try:
        yield
    except OSError as error:
        if new:
            shutil.rmtree(run_folder.path, ignore_errors=True)
        raise _unwritable(run_folder, error) from None


def _unwritable(run_folder: RunFolder, error: OSError) -> LaunchError:
    why = _in_words(error)
    return LaunchError(f"{run_folder}: cannot be written: {why}; free some, or set refiner.run.output to another disk")


def _in_words(error: OSError) -> str:
    said = str(error.args[0][0][2] if isinstance(error, shutil.Error) else error)  # copying a tree lists every file
    full = is_full(error) or f"[Errno {errno.ENOSPC}]" in said or f"[Errno {errno.EDQUOT}]" in said
    return "no room is left" if full else said


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
