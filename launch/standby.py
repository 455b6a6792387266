"""Takes the supervisor's place when it has been killed, by a person or for want of memory.

Slurm ends a job whose batch script is killed, and requeues it for nobody: a signal is no exit code that RequeueExit
knows. But it takes a requeue from a process of the job, while the job runs or is being cleared away. So the first task
on the supervisor's node keeps a small process beside it, that does nothing but wait for one of two to end:

    the task              nothing to do: the supervisor acts
    the supervisor        nothing to do where it has decided; else this decides by the same policy, and requeues

It imports what decides (launch/takeover.py) when it has to: there is one beside every job, and hardly any acts.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refiner_ds.run_folder import RunFolder

from .health.node import host_name
from .slurm import SUPERVISOR

MEANT_FOR_THE_TASK = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT, signal.SIGCONT)
REQUEUE_SECONDS = 60.0  # how long a task that leaves waits for its standby to have requeued the job


@contextmanager
def standby(run_folder: RunFolder) -> Iterator[None]:
    """Keep a standby beside this task while it runs, if it is the one to have it."""
    host, _, process = os.environ.get(SUPERVISOR, "").partition(":")
    if host != host_name() or os.environ.get("SLURM_LOCALID") != "0" or not _supervises(process):
        yield
        return
    log = run_folder.jobs / f"{os.environ['SLURM_JOB_ID']}_0_log.out"
    command = (sys.executable, "-u", "-m", __name__, str(run_folder), process, str(os.getpid()))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_THE_TASK)  # until it has handlers
    with log.open("ab") as out:
        beside = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield
    finally:  # Slurm would end it with this task
        if not _supervises(process):
            with suppress(subprocess.TimeoutExpired):
                beside.wait(REQUEUE_SECONDS)


def _supervises(process: str) -> bool:
    try:
        return b".supervisor" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def main(argv: list[str]) -> int:
    """``standby RUN_FOLDER SUPERVISOR TASK``, the latter two by their process ids."""
    told: list[int] = []
    for number in MEANT_FOR_THE_TASK:
        signal.signal(number, lambda number, frame: told.append(number))
    supervisor, task = map(_opened, argv[1:])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_THE_TASK)
    if supervisor is None:
        return _take_over(argv[0])
    if task is None:
        return 0
    ending = select.poll()
    ending.register(supervisor, select.POLLIN)
    ending.register(task, select.POLLIN)
    ended = {descriptor for descriptor, _ in ending.poll()}
    if task in ended or signal.SIGTERM in told:
        return 0  # the supervisor acts; or Slurm is ending the whole job, and has told us first
    return _take_over(argv[0])


def _take_over(run_folder: str) -> int:
    from .takeover import Takeover

    return Takeover(RunFolder(run_folder), ()).act_for_the_supervisor()


def _opened(process: str) -> int | None:
    """A descriptor that becomes readable when a process ends; None where it has ended."""
    try:
        return os.pidfd_open(int(process))
    except ProcessLookupError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
