"""The same job on this machine: submitit's local executor, made to end like a job of Slurm's.

submitit's controller waits for every task, even for those that wait for a dead one, and forgets how they ended.
``python -m launch.local <folder>`` is its own with two differences: the first task to fail ends the others, and the
controller leaves with that task's exit code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.local import local

from refiner_ds.exit_codes import RUN_AGAIN

from .job import LOCAL_RESTART_COUNT

TIMED_OUT = 124  # as timeout(1) has it
FOR_EVER = 60 * 24 * 366 * 10  # minutes; the controller counts in seconds and must be told something


class LocalExecutor(submitit.LocalExecutor):
    """Starts the tasks of a job as processes of this machine.

    Args:
        folder: where logs and pickles go.
        tasks: processes.
        devices: CUDA devices they share.
        environment: added to this process's.
        code: folder the job runs in.
    """

    def __init__(
        self, folder: Path, *, tasks: int, devices: str, environment: Mapping[str, str], code: Path,
        minutes: int | None, signal_seconds: int,
    ) -> None:  # fmt: skip
        super().__init__(folder)
        self._tasks, self._code = tasks, code
        self._environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH")))),
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
        self.controller = subprocess.Popen(
            (sys.executable, "-m", __name__, str(self.folder)),
            env={**self._environment, "SUBMITIT_LOCAL_COMMAND": command},
            cwd=self._code,
        )
        tasks = list(range(self._tasks))
        return submitit.LocalJob(self.folder, str(self.controller.pid), tasks, process=self.controller)


class Controller(local.Controller):
    """Starts the tasks, again when they ask for it, and ends them all with the first that fails."""

    stopping = False

    def _forward_signal(self, signum: signal.Signals, *args: object) -> None:
        self.stopping |= signum == signal.SIGTERM
        super()._forward_signal(signum, *args)

    def wait(self, freq: int = 24) -> list[int | None]:
        """Exit codes of the tasks, once all have left, one has failed, or the time is over."""
        begun, told = time.monotonic(), False
        while True:
            codes = [task.poll() for task in self.tasks]
            spent = time.monotonic() - begun
            failed = any(code not in (None, 0, local.LOCAL_REQUEUE_RETURN_CODE) for code in codes)
            if failed or None not in codes or spent > self.timeout_s:
                return codes
            if not told and spent > self.timeout_s - self.signal_delay_s:
                told = True
                self._forward_signal(signal.SIGUSR2)
            time.sleep(1 / freq)

    def lead(self) -> int:
        """Run the job to its end and return its exit code."""
        while True:
            os.environ[LOCAL_RESTART_COUNT] = str(int(os.environ.get(LOCAL_RESTART_COUNT, "-1")) + 1)
            try:
                self.start_tasks()
                codes = self.wait()
            finally:
                self.kill_tasks()
            failed = [code for code in codes if code not in (None, 0, local.LOCAL_REQUEUE_RETURN_CODE)]
            if failed:
                return 128 - failed[0] if failed[0] < 0 else failed[0]
            if None in codes:
                return TIMED_OUT
            if local.LOCAL_REQUEUE_RETURN_CODE not in codes:
                return 0
            if self.stopping:  # saved because someone asked it to end, not to begin again
                return RUN_AGAIN


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


if __name__ == "__main__":
    try:
        sys.exit(Controller(Path(sys.argv[1])).lead())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
