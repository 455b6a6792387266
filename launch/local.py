"""The same job on this machine: submitit's local executor, under the supervisor that Slurm jobs have.

submitit's controller waits for every task, even for those that wait for a dead one, and forgets how they ended. Here
the first task to fail ends the others, and launch/policy.py says whether all start again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import submitit
from submitit.local import local

from refiner_ds.exit_codes import RUN_AGAIN
from refiner_ds.run_folder import RunFolder

from .attempts import Record
from .diagnosis import TaskEnd
from .policy import Action, Decision, Limits
from .supervisor import Outcome, Supervisor

TIMED_OUT = 124  # as timeout(1) has it
FOR_EVER = 60 * 24 * 366 * 10  # minutes; the controller counts in seconds and must be given a number
ENDING_SECONDS = 1.0  # between the signals that end what is left of a failed job


class LocalExecutor(submitit.LocalExecutor):
    """Starts the tasks of a job as processes of this machine.

    Args:
        tasks: processes.
        devices: CUDA devices they share.
        environment: added to this process's.
    """

    def __init__(
        self, run_folder: RunFolder, *, tasks: int, devices: str, environment: Mapping[str, str],
        minutes: int | None, signal_seconds: int,
    ) -> None:  # fmt: skip
        super().__init__(run_folder.jobs)
        self._tasks, self._run_folder = tasks, run_folder
        self._environment = {
            **os.environ,
            **environment,
            "CUDA_VISIBLE_DEVICES": devices,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * (minutes or FOR_EVER)),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(signal_seconds),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }

    def _submit_command(self, command: str) -> submitit.LocalJob[Any]:
        # The job's number is its process's, which is known before its snapshot has it as a name.
        wait = (
            f'code="$1/$$"; while [ ! -d "$code" ]; do sleep 0.05; done; cd "$code" && '
            f'PYTHONPATH="$code${{PYTHONPATH:+:$PYTHONPATH}}" exec "$2" -u -m {__name__} "$3"'
        )
        self.controller = subprocess.Popen(
            ("sh", "-c", wait, "sh", str(self._run_folder.code), sys.executable, str(self._run_folder)),
            env={**self._environment, "SUBMITIT_LOCAL_COMMAND": command},
        )
        tasks = list(range(self._tasks))
        return submitit.LocalJob(self.folder, str(self.controller.pid), tasks, process=self.controller)


class Controller(local.Controller, Supervisor):
    """Starts the tasks, again where the policy says so, and ends them all with the first that fails."""

    stopping = False

    def __init__(self, run_folder: RunFolder) -> None:
        local.Controller.__init__(self, run_folder.jobs)
        Supervisor.__init__(self, run_folder, self.pid, run_folder.code / self.pid)

    nodes = property(lambda self: socket.gethostname())
    world = property(lambda self: (self.ntasks, self.ntasks if self.job.gpus else 0))

    def _forward_signal(self, signum: signal.Signals, *args: object) -> None:
        self.stopping |= signum == signal.SIGTERM
        super()._forward_signal(signum, *args)

    def run_tasks(self, variables: dict[str, str]) -> Outcome:
        """Start the processes and wait until all have left, one has failed, or the time is over."""
        os.environ.update(variables)
        try:
            self.start_tasks()
            return self._wait_for_tasks()
        finally:
            self._end_tasks()

    def _wait_for_tasks(self, freq: int = 24) -> Outcome:
        begun, told, host = time.monotonic(), False, socket.gethostname()
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            ends = [TaskEnd(rank, host, _how(code), now) for rank, code in enumerate(codes) if code]
            if ends:
                return Outcome(ends, ends[0].exit_code)
            if None not in codes:
                return Outcome([], 0)
            if now - begun > self.timeout_s:
                return Outcome([], TIMED_OUT, [f"error: the time limit of {self.timeout_s} s is over"])
            if not told and now - begun > self.timeout_s - self.signal_delay_s:
                told = True
                self._forward_signal(signal.SIGUSR2)
            time.sleep(1 / freq)

    def _end_tasks(self) -> None:
        """End what is left: SIGTERM, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + ENDING_SECONDS
            while any(task.poll() is None for task in self.tasks) and time.monotonic() < end:
                time.sleep(0.05)
            super()._forward_signal(number)
        self.kill_tasks()

    def act(self, record: Record, decide: Callable[[Limits], Decision]) -> int:
        """What is left of the policy on one machine: nobody else requeues, and there is no other node."""
        profile = self.job.profile
        return self.conclude(record, decide(Limits(profile.requeue, profile.requeues, cancelled=self.stopping)))

    def lead(self) -> int:
        """Run the job to its end and return its exit code."""
        while True:
            code = self.attempt()
            if self.attempts.records[-1].action == Action.END:
                return RUN_AGAIN if self.stopping else code


def _how(code: int) -> str:
    if code >= 0:
        return f"Exited with exit code {code}"
    return signal.strsignal(-code) or f"signal {-code}"


def visible_devices() -> list[str]:
    """CUDA devices of this machine that its user may use, by the name CUDA_VISIBLE_DEVICES gives them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device for device in chosen.split(",") if device.strip()]
    try:
        listed = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def gpu_name() -> str:
    """What the driver calls this machine's first GPU; empty where there is none."""
    try:
        listed = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return listed.stdout.partition("GPU 0: ")[2].partition(" (UUID")[0]


if __name__ == "__main__":
    try:
        sys.exit(Controller(RunFolder(sys.argv[1])).lead())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
