"""What every task of a job does: say who it is to torch, train, and turn the outcome into the job's fate.

submitit unpickles a ``TrainJob`` on each task and calls it. The exit code of training is the exit code of the task:

    0   finished                    75  interrupted and saved: the job requeues itself and continues from there
    2   refused                     *   crashed; srun and the local controller then end the other tasks
    3   diverged: the loss or a weight is not finite

submitit's own answer to a signal (rank 0 saves alone, requeues, and the others are killed) cannot save a state that is
spread over all ranks, so its handlers are replaced at once: until training puts up its own, a signal means that there
is nothing to save yet and the job is requeued as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from refiner_ds.exit_codes import RUN_AGAIN
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.signals import before_leaving

STUCK = 3  # requeues in a row without a new checkpoint, after which another would change nothing
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # what Slurm sends before a time limit, and when it ends or preempts a job
ATTEMPTS, AWAY_SECONDS, ANSWER_SECONDS = 3, 5.0, 12.0  # two questions in less than the two minutes a time limit leaves
AWAY = re.compile("timed out|unable to contact slurm controller", re.IGNORECASE)
LOCAL_RESTART_COUNT = (
    "REFINER_LOCAL_RESTART_COUNT"  # how often the local controller has restarted the tasks, as Slurm counts
)
PORTS = range(20000, 30000)  # below the ephemeral range, where any outgoing connection may sit on a port


@dataclass(frozen=True)
class TrainJob:
    """Training as a job: called once on every task.

    Args:
        arguments: what ``refiner_ds.train.main`` is given.
        run_folder: where ``latest`` and ``jobs/`` are.
        gpus: whether the tasks own GPUs; without, they must not take those they happen to see.
        requeues: how often the job may requeue itself.
    """

    arguments: list[str]
    run_folder: str
    gpus: bool
    requeues: int

    def __call__(self) -> None:
        task = submitit.JobEnvironment()
        for early in SIGNALS:
            signal.signal(early, self._before_training)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes before every TERM, and means nothing here
        os.environ.update(environment_of(task, self.gpus))
        failure = Failure.file(self.run_folder, task.job_id)
        try:
            from refiner_ds import train

            with before_leaving(self._left_from_within):
                code = train.main(self.arguments)
        except Exception:
            Failure(task.global_rank, task.hostname, 1).note(failure)
            raise
        for late in SIGNALS:
            signal.signal(late, signal.SIG_IGN)  # training has put the early handlers back, and they no longer apply
        if code == RUN_AGAIN:
            self._again(task, decides=task.global_rank == 0)
        if code:
            Failure(task.global_rank, task.hostname, code).note(failure)
            sys.exit(code)

    def _before_training(self, number: int, frame: FrameType | None) -> None:
        _log(f"{signal.Signals(number).name} before training began")
        self._again_unless_failed()

    def _left_from_within(self, code: int) -> None:
        """Training ends this process without returning: it was asked to before its first step, or it hangs."""
        if code == RUN_AGAIN:
            self._again_unless_failed()

    def _again_unless_failed(self) -> None:
        task = submitit.JobEnvironment()
        failed = Failure.noted(Failure.file(self.run_folder, task.job_id))
        if (
            failed and failed.restart_count == _restart_count()
        ):  # no preemption: srun is ending this task because of that one
            _log(f"rank {failed.rank} has failed")
            sys.exit(failed.exit_code)
        # None of the ranks will come to save together any more, so any may speak for all.
        self._again(task, decides=True)

    def _again(self, task: submitit.JobEnvironment, decides: bool) -> None:
        """Leave so that the job starts again, or with 75 if it had better not."""
        if not decides:
            sys.exit(0)  # anything else would have srun end rank 0 before it has asked for the requeue
        refusal = _ending(task) or self._requeue_refusal(task.job_id, task.global_rank)
        if refusal:
            _log(f"job {task.job_id} is not requeued: {refusal}")
            sys.exit(RUN_AGAIN)
        _log(f"requeueing job {task.job_id}")
        if task.cluster == "local":
            sys.exit(LOCAL_REQUEUE_RETURN_CODE)
        asked = _scontrol("requeue", task.job_id)
        if asked.returncode:
            _log(f"Slurm did not requeue: {asked.stderr.strip()}")
        sys.exit(RUN_AGAIN if asked.returncode else 0)

    def _requeue_refusal(self, job_id: str, rank: int) -> str | None:
        """Count this requeue, once for all tasks that ask for it; why there should not be another, or None."""
        ledger = RunFolder(self.run_folder).jobs / f"{job_id}_requeues.json"
        before: dict[str, Any] = {"requeues": 0, "latest": None, "stuck": 0, "restart_count": None}
        if ledger.exists():
            before |= json.loads(ledger.read_text())
        if before["restart_count"] == _restart_count():
            return None
        checkpoint = RunFolder(self.run_folder).latest_checkpoint()
        latest = checkpoint.name if checkpoint else None
        now: dict[str, Any] = {
            "requeues": before["requeues"] + 1,
            "latest": latest,
            "stuck": before["stuck"] + 1 if latest == before["latest"] else 0,
            "restart_count": _restart_count(),
        }
        if now["requeues"] > self.requeues:
            return f"it has requeued itself {self.requeues} times, which is all its profile allows (requeues)"
        if now["stuck"] >= STUCK:
            return f"{STUCK} times in a row it got no further than checkpoint {latest or 'none'}"
        write_atomically(ledger, json.dumps(now), writer=str(rank))  # other tasks may write at the same moment
        return None


@dataclass(frozen=True)
class Failure:
    """The first task of a job to fail. Slurm reports the highest exit code, which is that of a task it killed after."""

    rank: int
    host: str
    exit_code: int
    restart_count: int = field(default_factory=lambda: _restart_count())  # of the start it failed in

    @staticmethod
    def file(run_folder: str | Path, job_id: str) -> Path:
        """Where a job notes its failure."""
        return RunFolder(run_folder).jobs / f"{job_id}_failure.json"

    def note(self, file: Path) -> None:
        """Write this down unless another task came first since the job last started."""
        before = Failure.noted(file)
        if before and before.restart_count != self.restart_count:
            file.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError), file.open("x") as note:
            json.dump(asdict(self), note)

    @staticmethod
    def noted(file: Path) -> Failure | None:
        """What a job noted, if it did."""
        try:
            return Failure(**json.loads(file.read_text()))
        except (FileNotFoundError, ValueError):  # none, or a task that was killed while it wrote
            return None


def _restart_count() -> int:
    return int(os.environ.get(LOCAL_RESTART_COUNT) or os.environ.get("SLURM_RESTART_COUNT", "0"))


def environment_of(task: submitit.JobEnvironment, gpus: bool) -> dict[str, str]:
    """The variables torchrun would set, for one task of a job."""
    local_world = task.num_tasks // task.num_nodes
    several_nodes = task.num_nodes > 1
    given = {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        # On one node its name need not resolve, and often does not on a laptop.
        "MASTER_ADDR": task.hostnames[0] if several_nodes else "127.0.0.1",
        "MASTER_PORT": str(PORTS[int(task.job_id.partition("_")[0]) % len(PORTS)]),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # A GPU's process leaves the cores to its loader workers; on CPU the cores are what trains.
        given["OMP_NUM_THREADS"] = "1" if gpus else str(_cores_of_a_task(local_world))
    if not gpus:
        given["CUDA_VISIBLE_DEVICES"] = ""
    return given


def _cores_of_a_task(local_world: int) -> int:
    asked, on_node = os.environ.get("SLURM_CPUS_PER_TASK"), os.environ.get("SLURM_CPUS_ON_NODE")
    if asked:
        return int(asked)
    return max(1, int(on_node or len(os.sched_getaffinity(0))) // local_world)


def _ending(task: submitit.JobEnvironment) -> str | None:
    """Why Slurm is already ending this job for good, or None."""
    # scancel sends TERM as preemption does, and Slurm would requeue a cancelled job as readily as any other. Until the
    # tasks have left, the job is COMPLETING either way; past its time limit it is too, and should go on.
    if task.cluster == "local":
        return None
    shown = _scontrol("show", "job", "-o", task.job_id)
    fields = set(shown.stdout.split())
    ending = fields & {"JobState=CANCELLED", "JobState=COMPLETING"} and "Reason=TimeLimit" not in fields
    return "it was cancelled" if ending else None


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """Slurm's answer, asked again while its controller is away, as it is when it restarts; without one, a failure."""
    command = ("scontrol", *words)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(AWAY_SECONDS)
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            answer = subprocess.CompletedProcess(command, 1, "", str(error))
        if not answer.returncode or not AWAY.search(answer.stderr):
            break
    return answer


def _log(what: str) -> None:
    print(f"launch {time.strftime('%Y-%m-%d %H:%M:%S')}: {what}", flush=True)
