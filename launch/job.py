"""What every task of a job does: tell torch who it is, train, and leave with training's exit code.

A job of a chain may run a command on the run folder instead (launch/commands.py).

submitit unpickles a ``Task`` on each task and calls it. What follows from the exit codes is the supervisor's
business (launch/policy.py):

    0   finished                    75  interrupted and saved, or hung: the job is requeued and resumes
    2   refused                     *   crashed: srun, or the local controller, ends the other tasks; requeued
    3   diverged: the loss or a weight is not finite

submitit's own answer to a signal (rank 0 saves alone, requeues, and the others are killed) cannot save a state that is
spread over all ranks, so its handlers are replaced at once: until training puts up its own, a signal means that there
is nothing to save yet.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit

from refiner_ds.errors import RefinerError, print_error
from refiner_ds.exit_codes import CRASHED, FINISHED, REFUSED, RUN_AGAIN
from refiner_ds.files import is_full
from refiner_ds.run_folder import RunFolder

from . import slurm
from .attempts import Failure
from .cluster import ClusterProfile
from .commands import Command
from .diagnosis import UNHEALTHY
from .environment import variables_on
from .health.start import node_faults
from .snapshot import RUN_FILE, check_code
from .standby import standby

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # what Slurm sends before a time limit, and when it ends or preempts a job


@dataclass(frozen=True)
class Task:
    """Training, or a command on its run folder, as a job: called once on every task.

    Args:
        run_folder: where results go; the task runs in the job's snapshot of the code.
        gpus: whether the tasks own GPUs; without, they must not take those they happen to see.
        workers: whether loader workers are used.
        profile: of the cluster.
        command: what runs in the place of training.
    """

    run_folder: str
    gpus: bool
    workers: bool
    profile: ClusterProfile
    command: Command | None = None

    def __call__(self) -> None:
        with standby(RunFolder(self.run_folder)):
            self._run(submitit.JobEnvironment())

    def _run(self, task: submitit.JobEnvironment) -> None:
        for early in SIGNALS:
            signal.signal(early, _nothing_to_save)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes before every TERM, and means nothing here
        os.environ.update(variables_on(task.hostname, self.profile.node_environment))
        os.environ.update(environment_of(task, self.gpus))
        code = Path.cwd()
        try:
            check_code(code)
            self._check_node(task)
            exit_code = self._main(code)
        except RefinerError as error:
            print_error(str(error))
            self._note(task, REFUSED, str(error))
            sys.exit(REFUSED)
        except OSError as error:
            self._note(task, CRASHED, f"{type(error).__name__}: {error}")
            if is_full(error):  # a traceback would be cut off by the very disk that is full
                print_error(f"{error.strerror}: {error.filename or self.run_folder}")
                sys.exit(CRASHED)
            raise
        except Exception as error:
            self._note(task, CRASHED, f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        for late in SIGNALS:
            signal.signal(late, signal.SIG_IGN)  # training has put the early handlers back, and they no longer apply
        if exit_code == RUN_AGAIN and task.global_rank:
            sys.exit(FINISHED)  # all have saved; anything else would have srun end rank 0 while it still tidies up
        sys.exit(exit_code)

    def _main(self, code: Path) -> int:
        if self.command is not None:
            return self.command.run(Path(self.run_folder))
        from refiner_ds import train

        return train.main(["--config", str(code / RUN_FILE)])

    def _check_node(self, task: submitit.JobEnvironment) -> None:
        if not self.profile.health_check or task.local_rank:
            return
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        wanted = len(seen.split(",")) if self.gpus and seen else int(self.gpus)
        faults = node_faults(Path(self.run_folder), wanted, self.workers)
        if faults:
            print_error(f"{task.hostname}: {'; '.join(faults)}")
            self._note(task, CRASHED, UNHEALTHY + "; ".join(faults))
            sys.exit(CRASHED)

    def _note(self, task: submitit.JobEnvironment, exit_code: int, error: str) -> None:
        failure = Failure(task.global_rank, task.hostname, exit_code, error, time.time())
        failure.note(RunFolder(self.run_folder), task.job_id, slurm.restart_count())


def _nothing_to_save(number: int, frame: FrameType | None) -> NoReturn:
    print(f"{signal.Signals(number).name} came while there was nothing to save", flush=True)
    sys.exit(RUN_AGAIN)


def environment_of(task: submitit.JobEnvironment, gpus: bool) -> dict[str, str]:
    """The variables torchrun would set, for one task of a job."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or task.num_nodes)  # an elastic job may leave some idle
    local_world = task.num_tasks // nodes
    several_nodes = nodes > 1
    given = {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": os.environ.get("REFINER_MASTER_ADDR") or (task.hostnames[0] if several_nodes else "127.0.0.1"),
        "MASTER_PORT": os.environ["REFINER_MASTER_PORT"],
    }
    if gpus and local_world > 1 and _visible_gpus() == 1:
        # Each task was given one GPU of its own (srun's gpu-bind, gpus-per-task): for torch it is the first and only.
        given |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        # A GPU's process leaves the cores to its loader workers; on CPU the cores are what trains.
        given["OMP_NUM_THREADS"] = "1" if gpus else str(_cores_of_a_task(local_world))
    if not gpus:
        given["CUDA_VISIBLE_DEVICES"] = ""
    return given


def _visible_gpus() -> int:
    return len([device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()])


def _cores_of_a_task(local_world: int) -> int:
    asked, on_node = os.environ.get("SLURM_CPUS_PER_TASK"), os.environ.get("SLURM_CPUS_ON_NODE")
    if asked:
        return int(asked)
    return max(1, int(on_node or len(os.sched_getaffinity(0))) // local_world)
