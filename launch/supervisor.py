"""Starts the tasks of a job, sees how they end, and does what launch/policy.py decides.

    sbatch ─▶ batch script ─▶ supervisor ─▶ srun ─▶ one task a process (launch/job.py)
                                  │
                  tasks end ─▶ diagnosis ─▶ policy ─▶ requeue, requeue without a node, or end with an exit code

It runs on the first node of a Slurm job, outlives tasks that are killed, and needs nothing from them; launch/standby.py
acts where it is killed itself. The controller of a job on one machine (launch/local.py) is another ``Supervisor``, with
processes where this one has srun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.exit_codes import REFUSED, RUN_AGAIN
from refiner_ds.files import read_object
from refiner_ds.output import lasting_output
from refiner_ds.run_folder import RunFolder

from . import policy, slurm
from .attempts import Attempts, Failure, Record, owner
from .cluster import ClusterProfile
from .cost import cost_line
from .diagnosis import Diagnosis, TaskEnd, diagnose, last_lines, task_ends, verdict_since
from .elastic import step_size, usable_nodes, watch_for_nodes
from .environment import capture, free_port, master_address
from .health.node import host_name
from .policy import Action, Cause, Decision, Limits
from .snapshot import JOB_FILE, RUN_FILE, check_code
from .symptoms import ADVICE, BY_NAME, recognise

ASK_SECONDS = 5.0  # between two questions to a controller that is away, or refuses
AWAY_SECONDS = 3600.0  # how long it may be away when the job wants to be requeued
REFUSED_SECONDS = 120.0  # how long it may answer and refuse
NOTIFY_SECONDS = 15.0
EXCLUDE_SECONDS = 20.0  # how long it may refuse to leave a node out
EXCLUDE_TRIES = 3  # how often a node is asked to be left out, where the job comes back to it all the same
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)  # meant for the tasks, which get them too


@dataclass(frozen=True)
class Job:
    """What the submission left for the supervisor in its snapshot (job.json).

    Attributes:
        tasks: processes a node; ``gpus`` GPUs a node.
        min_nodes: nodes it can do with; ``nodes`` unless it is elastic.
        label: of a command that runs on the run folder; empty for training.
    """

    profile: ClusterProfile
    nodes: int
    tasks: int
    gpus: int
    min_nodes: int
    label: str = ""

    @property
    def elastic(self) -> bool:
        """Whether it can do with fewer nodes than it asks for."""
        return self.min_nodes < self.nodes

    @staticmethod
    def read(code: Path) -> Job:
        """The job of a snapshot. Raises LaunchError where its file is not what was written."""
        try:
            known = json.loads((code / JOB_FILE).read_text())
            profile = ClusterProfile.model_validate(known["profile"])
            return Job(profile, known["nodes"], known["tasks"], known["gpus"], known["min_nodes"], known["label"])
        except (OSError, ValueError, KeyError, TypeError):
            raise LaunchError(f"{code / JOB_FILE}: missing or cut; the snapshot is damaged: submit again") from None

    def to_json(self) -> dict[str, object]:
        """What ``read`` reads."""
        return {**asdict(self), "profile": self.profile.model_dump()}


@dataclass(frozen=True)
class Outcome:
    """What was seen of the tasks: how they ended, srun's exit code, and what srun and Slurm said."""

    ends: Sequence[TaskEnd]
    exit_code: int
    said: Sequence[str] = ()


class Supervisor(ABC):
    """What the supervisors of Slurm jobs and of local ones have in common.

    Args:
        code: the snapshot the job runs from.
    """

    def __init__(self, run_folder: RunFolder, job_id: str, code: Path) -> None:
        self.run_folder, self.job_id, self.code = run_folder, job_id, code
        self.job = Job.read(code)
        self.attempts = Attempts.of(run_folder, job_id)

    @abstractmethod
    def run_tasks(self, variables: dict[str, str]) -> Outcome:
        """Start the tasks with these environment variables and wait until they have ended."""

    @abstractmethod
    def act(self, record: Record, decide: Callable[[Limits], Decision]) -> int:
        """Find out the limits, do what is decided, and return the exit code."""

    @property
    @abstractmethod
    def nodes(self) -> str:
        """The nodes of this attempt."""

    def unwanted_node(self) -> str:
        """A node of this attempt that the job was to go on without; empty where there is none."""
        return ""

    @property
    def address(self) -> str:
        """Where the ranks meet. One machine's name need not resolve, and often does not on a laptop."""
        return "127.0.0.1"

    @property
    @abstractmethod
    def world(self) -> tuple[int, int]:
        """Tasks and GPUs of this attempt."""

    def attempt(self) -> int:
        """One start of the tasks, to its end. Returns the exit code."""
        record = self.attempts.begin(self.nodes, *self.world, self.run_folder)
        sizes = {file.name: file.stat().st_size for file in self.run_folder.jobs.glob(f"{self.job_id}_*_log.out")}
        try:
            self._refuse()
            if node := self.unwanted_node():
                return self._end(record, _misplaced(node))
            variables = {
                "REFINER_RESTART_COUNT": str(record.number),
                "REFINER_MASTER_ADDR": self.address,
                "REFINER_MASTER_PORT": str(free_port(self.job_id, record.number)),
            }
        except LaunchError as error:
            found = recognise([str(error)])
            name, advice = (found[0].name, found[0].advice) if found else ("refused", ADVICE["refused"])
            return self._end(record, Diagnosis(Cause.REFUSED, REFUSED, None, "", name, str(error), advice))
        capture(self.run_folder.jobs / f"{self.job_id}_environment.json", self.nodes)
        self.notify("restart" if record.number else "start", f"started on {self.nodes}")
        outcome = self.run_tasks(variables)
        trains = not self.job.label
        if trains:
            self._release_lock()

        def tail(rank: int) -> list[str]:
            file = self.run_folder.jobs / f"{self.job_id}_{rank}_log.out"
            return last_lines(file, sizes.get(file.name, 0))

        failures = Failure.noted(self.run_folder, self.job_id, record.number)
        verdict = verdict_since(self.run_folder, record.started) if trains else None
        return self._end(record, diagnose(outcome.ends, outcome.exit_code, failures, tail, outcome.said, verdict))

    def setup_failed(self, line: str) -> int:
        """A setup line of the profile failed: an attempt that is refused."""
        record = self.attempts.begin(self.nodes, *self.world, self.run_folder)
        name = "setup line failed"
        return self._end(record, Diagnosis(Cause.REFUSED, REFUSED, None, "", name, line, BY_NAME[name].advice))

    def _refuse(self) -> None:
        """Raise LaunchError where this job may not, or cannot, run."""
        owned = owner(self.run_folder)
        if not self.job.label and owned not in (None, self.job_id):
            raise LaunchError(f"{self.run_folder}: belongs to job {owned} now; this one ends")
        check_code(self.code)

    def _release_lock(self) -> None:
        """Remove the run folder's lock where a task that has just ended left it: nobody need wait until it is stale."""
        with suppress(OSError):
            if (read_object(self.run_folder.lock) or {}).get("host") in expand(self.nodes):
                self.run_folder.lock.unlink()

    def _end(self, record: Record, diagnosis: Diagnosis) -> int:
        newest = self.run_folder.latest_checkpoint()
        record.ended, record.saved = time.time(), newest.name if newest else None
        record.step = last_step(self.run_folder)
        record.cause, record.exit_code = diagnosis.cause, diagnosis.exit_code
        record.rank, record.node, record.blames_node = diagnosis.rank, diagnosis.node, diagnosis.blames_node
        record.symptom, record.evidence, record.advice = diagnosis.symptom, diagnosis.evidence, diagnosis.advice
        before = [earlier.attempt() for earlier in self.attempts.records[:-1]]
        if diagnosis.cause not in (Cause.FINISHED, Cause.INTERRUPTED):
            log(str(record))

        def decide(limits: Limits) -> Decision:
            return policy.decide(record.attempt(), before, limits, record.saved or "none")

        return self.act(record, decide)

    def conclude(self, record: Record, decision: Decision) -> int:
        """Write down, print and tell what was decided, before it is done: what follows may end this process."""
        record.action, record.reason = decision.action, decision.reason
        self.attempts.write()
        if decision.action != Action.END:
            without = f" without {decision.node}" if decision.node else ""
            log(f"requeueing job {self.job_id}{without}: {decision.reason}")
            self.notify("requeue", f"{record}; requeued{without}")
            return decision.exit_code
        if record.cause == Cause.FINISHED:
            self.notify("end", "finished")
        else:
            log(f"job {self.job_id} is not requeued: {decision.reason}")
            self.notify("end" if decision.cancelled else "failure", f"{record}; {decision.reason}")
        log(cost_line(None if self.job.label else self.run_folder, self.attempts))
        return decision.exit_code

    def notify(self, event: str, message: str) -> None:
        """Run the profile's ``notify`` command; its failure is logged and changes nothing."""
        command = self.job.profile.notify
        if not command:
            return
        name = ":".join(filter(None, (self.run_folder.path.name, self.job.label)))
        told = {"REFINER_EVENT": event, "REFINER_RUN": name, "REFINER_JOB": self.job_id}
        message = f"{name} (job {self.job_id}): {message}"
        try:
            done = subprocess.run(
                ("sh", "-c", command),
                env={**os.environ, **told, "REFINER_MESSAGE": message},
                capture_output=True,
                text=True,
                timeout=NOTIFY_SECONDS,
            )
            if done.returncode:
                log(f"notify failed with exit code {done.returncode}: {slurm.last_line(done.stderr)}")
        except (OSError, subprocess.TimeoutExpired) as error:
            log(f"notify failed: {error}")


class SlurmSupervisor(Supervisor):
    """The supervisor of a Slurm job: srun starts the tasks, scontrol requeues."""

    def __init__(self, run_folder: RunFolder, command: Sequence[str]) -> None:
        job_id = os.environ["SLURM_JOB_ID"]
        super().__init__(run_folder, job_id, run_folder.code / job_id)
        self._command = command
        self._restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    @property
    def nodes(self) -> str:
        return os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())

    @property
    def address(self) -> str:
        several = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1
        return master_address(self.job.profile.master_addr) if several else super().address

    @property
    def world(self) -> tuple[int, int]:
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        return nodes * self.job.tasks, nodes * self.job.gpus

    def run_tasks(self, variables: dict[str, str]) -> Outcome:
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        ends: list[TaskEnd] = []
        said: list[str] = []
        command = [*self._command]
        if self.job.elastic:
            command[1:1] = self._fit()
        variables = variables | {slurm.SUPERVISOR: f"{host_name()}:{os.getpid()}"}
        with subprocess.Popen(
            command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as tasks:
            assert tasks.stderr is not None
            for line in tasks.stderr:
                print(line, end="", flush=True)
                said.append(line.rstrip())
                ends += task_ends(line, time.monotonic())
        return Outcome(ends, tasks.returncode if tasks.returncode >= 0 else 128 - tasks.returncode, said)

    def act(self, record: Record, decide: Callable[[Limits], Decision]) -> int:
        if record.cause in (Cause.FINISHED, Cause.REFUSED, Cause.DIVERGED):
            return self.conclude(record, decide(Limits()))
        # A requeue, whoever asks for it, has Slurm TERM all that runs in the batch step. Commands inherit that these
        # signals are ignored, and have until KillWait: else one of them would be ended before it has asked.
        for number in (*SIGNALS, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        now = time.monotonic()
        refused_until, asked = now + REFUSED_SECONDS, None
        for _ in slurm.until(now + AWAY_SECONDS, ASK_SECONDS):
            state = self._state()
            if state is None:
                refused_until = time.monotonic() + REFUSED_SECONDS
                continue
            if asked and self._requeued(state):  # by the question that was asked last, though its answer was lost
                return self._exclude(asked.node, state)
            limits = self._limits(state, record)
            decision = decide(limits)
            if decision.action == Action.END or limits.requeued:
                return self.conclude(record, decision)
            if not asked:
                self.conclude(record, decision)
            asked = decision
            objection = slurm.requeue(self.job_id)
            after = self._state() if objection else None
            if objection is None or (after and self._requeued(after)):
                return self._exclude(asked.node, state)
            log(f"Slurm did not requeue: {objection}")
            if time.monotonic() > refused_until:
                break
        log(f"job {self.job_id} could not be requeued; submit the run again, and it resumes")
        record.action, record.reason = Action.END, "Slurm did not requeue it"
        self.attempts.write()
        return RUN_AGAIN  # where the site has RequeueExit=75 it is requeued all the same

    def unwanted_node(self) -> str:
        """Slurm leaves a node out only while a job waits. Where it was not told in time, the job begins there again."""
        left_out = [record.node for record in self.attempts.records if record.action == Action.REQUEUE_WITHOUT_NODE]
        wanted = [node for node in expand(self.nodes) if 0 < left_out.count(node) < EXCLUDE_TRIES]
        state = self._state() if wanted else None
        return wanted[0] if state and self._spare_nodes(state) else ""

    def _state(self) -> slurm.JobState | None:
        return slurm.job_state(self.job_id, slurm.TASK_ANSWER_SECONDS)

    def _requeued(self, state: slurm.JobState) -> bool:
        return state.restarts > self._restarts

    def _limits(self, state: slurm.JobState, record: Record) -> Limits:
        requeued = self._requeued(state)
        # scancel sends TERM as preemption does, and Slurm would requeue a cancelled job as readily as any other. Until
        # the tasks have left, the job is COMPLETING; past its time limit it is too, and should go on.
        ending = state.state in ("CANCELLED", "COMPLETING") and state.reason != "TimeLimit"
        spare = self._spare_nodes(state) if record.blames_node else 0
        profile = self.job.profile
        return Limits(profile.requeue, profile.requeues, ending and not requeued, requeued, spare)

    def _spare_nodes(self, state: slurm.JobState) -> int:
        excluded = state.fields.get("ExcNodeList", "(null)")
        return slurm.spare_nodes(state.fields.get("Partition"), expand(self.nodes) + expand(excluded))

    def _fit(self) -> tuple[str, ...]:
        """srun's flags for the nodes that an elastic job was given and can use; watches for more."""
        job, given = self.job, self._allocated

        def usable(more: int) -> int:
            return usable_nodes(self.code / RUN_FILE, given + more, job.min_nodes, job.tasks)

        nodes = usable(0)
        log(f"{nodes} of {given} nodes are used, {nodes * job.tasks} processes")
        if given < job.nodes:
            partition = os.environ["SLURM_JOB_PARTITION"]
            watch_for_nodes(self.job_id, partition, job.nodes - given, usable, job.profile.grow_minutes, log)
        return step_size(nodes, job.tasks)

    @property
    def _allocated(self) -> int:
        return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))

    def _exclude(self, node: str, state: slurm.JobState) -> int:
        """Leave a node out of the job, which has just been requeued. Returns the exit code."""
        if not node:
            return 0
        before = state.fields.get("ExcNodeList", "").replace("(null)", "")
        objection: str | None = None
        for _ in slurm.until(time.monotonic() + EXCLUDE_SECONDS, 1.0):
            objection = slurm.exclude(self.job_id, ",".join(filter(None, (before, node))))
            if objection is None:
                return 0
        log(f"Slurm did not exclude {node}: {objection}; asked again if the job begins there")
        return 0


def _misplaced(node: str) -> Diagnosis:
    symptom, evidence = "is to be left out, and Slurm was not told in time", "the job began there again"
    return Diagnosis(Cause.MISPLACED, RUN_AGAIN, None, node, symptom, evidence, "", blames_node=True)


def expand(nodes: str) -> list[str]:
    """The names in Slurm's "node[1-3,7],login1"; empty for "(null)"."""
    from submitit.slurm.slurm import _parse_node_list

    return [] if nodes in ("", "(null)") else list(_parse_node_list(nodes))


def last_step(run_folder: RunFolder) -> int | None:
    """The last optimizer step that training logged."""
    for line in reversed(last_lines(run_folder.metrics)):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def log(what: str) -> None:
    """A line of the launcher's in the job's log."""
    with lasting_output():
        print(f"launch {time.strftime('%Y-%m-%d %H:%M:%S')}: {what}", flush=True)


@report_errors
def main(argv: list[str] | None = None) -> int:
    """``supervisor RUN_FOLDER -- COMMAND …``, or ``--setup-failed LINE``; on the first node of a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--setup-failed", metavar="LINE")
    parser.add_argument("command", nargs="*", help="what starts the tasks")
    args = parser.parse_args(argv)
    supervisor = SlurmSupervisor(RunFolder(args.run_folder), args.command)
    if args.setup_failed is not None:
        return supervisor.setup_failed(args.setup_failed)
    return supervisor.attempt()


if __name__ == "__main__":
    sys.exit(main())
