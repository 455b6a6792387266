"""Why a job waits, failed or was requeued, in one sentence, from Slurm and the run folder or from the latter alone."""

from __future__ import annotations

import re
import time

from refiner_ds.run_folder import RunFolder

from .attempts import Attempts, Record
from .diagnosis import last_lines
from .policy import CANCELLED, Action, Cause
from .slurm import JobState
from .symptoms import recognise

# Slurm's words for why a job waits, by their beginning.
WAITING = {
    "Resources": "it waits until enough nodes are free",
    "Priority": "jobs of higher priority are before it",
    "Dependency": "it waits for the job it depends on",
    "DependencyNeverSatisfied": "the job it depends on failed, so it will never start: cancel it, or mend the other",
    "BeginTime": "it starts again in a moment: Slurm lets a requeued job wait for a minute or two",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHeldAdmin": "an administrator holds it: ask why",
    "JobHoldMaxRequeue": "Slurm holds it after too many requeues: scontrol release it",
    "launch failed requeued held": "a node could not launch it, and Slurm holds it: scontrol release it",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved (sinfo -R)",
    "Nodes required for job are DOWN": "nodes it needs are down, drained or reserved (sinfo -R)",
    "PartitionDown": "its partition is down: choose another with --partition",
    "PartitionInactive": "its partition starts no jobs: choose another with --partition",
    "PartitionTimeLimit": "it asks for more time than its partition allows: lower hours",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows: lower --nodes or choose another partition",
    "PartitionConfig": "its partition does not give what it asks for: choose another with --partition",
    "BadConstraints": "no node has what it asks for: correct constraint, gpus_per_node, cpus_per_task or mem_gb",
    "Licenses": "it waits for a licence",
    "Reservation": "it waits for its reservation to begin",
    "InvalidAccount": "its account does not exist or is not yours: correct account",
    "InvalidQOS": "its quality of service does not exist or is not yours: correct qos",
    "QOS": "a limit of its quality of service is reached; it starts when your other jobs end",
    "Assoc": "a limit of your account is reached; it starts when other jobs of the account end",
    "MaxCpuPerAccount": "a limit of your account is reached; it starts when other jobs of the account end",
    "Cleaning": "its last attempt is still being cleared away",
    "JobArrayTaskLimit": "as many of its array run as may at once",
    "FedJobLock": "clusters of the federation agree on where it runs",
}


def why(run_folder: RunFolder, job_id: str, state: JobState | None) -> str:
    """One sentence, without a full stop.

    Args:
        state: what Slurm says of it; None: Slurm does not answer or no longer knows it, or the job is local.
    """
    records = Attempts.of(run_folder, job_id).records
    last = records[-1] if records else None
    if state is not None and state.state == "PENDING":
        return waits(state, last)
    if state is not None and state.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED"):
        return _runs(state, last)
    if last is None:
        return _never_started(run_folder, job_id, state)
    if state is not None and state.state in ("NODE_FAIL", "BOOT_FAIL"):
        return f"a node of {state.nodes or last.nodes} failed: see sinfo -R"
    if last.ended is None and state is None:
        return f"it started {ago(last.started)} on {last.nodes} and had not ended when it last wrote"
    if last.cause is None:
        return _unseen_end(run_folder, job_id, state, last)
    return explain(last)


def explain(record: Record) -> str:
    """What became of an attempt, what was decided, and what to do."""
    if record.cause == Cause.FINISHED:
        return "it finished"
    decided = f"; it was requeued: {record.reason}" if record.action != Action.END else ""
    stopped = f"; not requeued: {record.reason}" if record.action == Action.END and record.reason else ""
    advice = f"; {record.advice}" if record.advice else ""
    if record.cause == Cause.INTERRUPTED and record.reason == CANCELLED:
        return f"{CANCELLED}, and {str(record).removeprefix('asked to stop; ')}"
    return f"{record}{decided or stopped}{advice}"


def waits(state: JobState, last: Record | None) -> str:
    """Why Slurm does not start it, when it might, and why it is in the queue again."""
    reason = state.fields.get("Reason", "").strip("()")
    matching = [known for known in WAITING if reason.replace("_", " ").startswith(known)]
    words = WAITING[max(matching, key=len)] if matching else "Slurm has not said why"
    start = state.fields.get("StartTime", "Unknown")
    expected = f"; expected to start {start.replace('T', ' ')}" if start not in ("Unknown", "N/A", "") else ""
    again = f"; requeued after this: {last}" if last and last.cause else ""
    return f"{words} (Slurm: {reason or 'None'}){expected}{again}"


def _runs(state: JobState, last: Record | None) -> str:
    now = f"it is {state.state.lower()} on {state.nodes}"
    earlier = state.restarts
    if not earlier or last is None:
        return now
    return f"{now}, restarted {earlier} time{'' if earlier == 1 else 's'}"


def _never_started(run_folder: RunFolder, job_id: str, state: JobState | None) -> str:
    log = run_folder.jobs / f"{job_id}_0_log.out"
    lines = last_lines(log)
    if (found := recognise(lines)) is not None:
        return f"{found[0].name}: {found[1]}; {found[0].advice}"
    if state is None:
        return "it has not started, as far as its run folder tells"
    if state.reason == "DependencyNeverSatisfied":
        before = re.search(r"(\d+)\(failed\)", state.fields.get("Dependency", ""))
        which = f"job {before[1]}, which it follows," if before else "the job that it follows"
        return f"{which} did not finish, so Slurm cancelled this one before it started: ask why of that one"
    if state.state == "CANCELLED":
        return "it was cancelled before it started"
    told = f"Slurm: {state.exit_text}"
    if not log.exists():
        node = state.fields.get("BatchHost") or state.nodes or "its node"
        return (
            f"{node} could not open its log {log} ({told}): the run folder must lie where every node sees it, and may"
            " write; set refiner.run.output"
        )
    tail = f": {lines[-1]}" if lines else ""
    return f"its batch script ended before the supervisor began ({told}){tail}; read {log}"


def _unseen_end(run_folder: RunFolder, job_id: str, state: JobState | None, last: Record) -> str:
    told = f" (Slurm: {state.exit_text})" if state else ""
    if state is not None and state.state == "CANCELLED":
        return f"it was cancelled{told}"
    if state is not None and state.state == "TIMEOUT":
        return f"its time limit was over before it had saved{told}; raise signal_seconds: a step and a save must fit"
    lines = last_lines(run_folder.jobs / f"{job_id}_0_log.out")
    if (found := recognise(lines)) is not None:
        return f"{found[0].name}: {found[1]}; {found[0].advice}"
    killed = state is not None and (state.signal == 9 or state.state == "OUT_OF_MEMORY")
    if killed:
        return (
            f"its supervisor on the first node of {last.nodes} was killed{told}; raise mem_gb if memory was short, and"
            " submit the run again: it resumes"
        )
    return f"its end was not seen{told}; submit the run again: it resumes"


def ago(moment: float) -> str:
    """How long ago a moment (unix seconds) was, in its largest unit."""
    seconds = int(time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
