"""What decides and requeues in the place of a supervisor that was killed; launch/standby.py says when."""

from __future__ import annotations

import signal

from . import slurm
from .attempts import Attempts, Record
from .diagnosis import Diagnosis
from .health.node import host_name
from .policy import Cause, Limits
from .supervisor import SlurmSupervisor
from .symptoms import ADVICE

KILLED = 128 + signal.SIGKILL


class Takeover(SlurmSupervisor):
    """A supervisor that has seen no task end, only that the one before it is gone."""

    def act_for_the_supervisor(self) -> int:
        """Requeue the job where the policy says so. Returns the exit code."""
        self.attempts = Attempts.of(self.run_folder, self.job_id)
        record = self.attempts.records[-1] if self.attempts.records else None
        if record is None or record.action:
            return 0  # it had decided
        name = "supervisor killed"
        evidence = f"the supervisor on {host_name()} was killed, and with it the batch script"
        return self._end(record, Diagnosis(Cause.CRASHED, KILLED, None, "", name, evidence, ADVICE[name]))

    def _limits(self, state: slurm.JobState, record: Record) -> Limits:
        # Slurm is clearing the job away, because its batch script has ended: not on account of scancel.
        profile = self.job.profile
        return Limits(profile.requeue, profile.requeues, state.state == "CANCELLED", self._requeued(state))
