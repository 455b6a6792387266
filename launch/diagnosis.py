"""Which rank failed first, and of what: from srun's words, the ranks' own notes and logs, and the heartbeats' verdict.

A rank that dies of a signal says nothing; those that were talking to it fail a moment later and say a lot. So what
srun, or the kernel, says of a task outranks another rank's "connection reset by peer".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from refiner_ds.exit_codes import DIVERGED, FINISHED, REFUSED, RUN_AGAIN
from refiner_ds.files import read_object
from refiner_ds.run_folder import RunFolder

from . import symptoms
from .attempts import Failure
from .policy import Cause
from .symptoms import ADVICE, SIGNALLED

TOGETHER_SECONDS = 3.0  # a task that dies so soon after the first was not killed by srun, which waits longer
UNHEALTHY = "unhealthy node: "
TAIL_BYTES = 64 * 1024
SIGNAL_CODES = {
    "killed": 137, "out of memory": 137, "segmentation fault": 139, "bus error": 135, "aborted": 134,
    "terminated": 143, "illegal instruction": 132, "floating point exception": 136,
}  # fmt: skip
SRUN_TASK = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)")
# The last two: before srun had started a task the job was over, or in the queue again.
ABORTED = re.compile(
    r"\*\*\* (JOB|STEP) .* CANCELLED AT|Job step aborted|Force Terminated|forcing job termination"
    r"|Job/step already completing or completed|Job is pending execution"
)
SRUN_NODE = re.compile(
    r"(?:Node failure on|failed on node|aborted on node|Prolog.* on) (?P<node>[\w.-]+)", re.IGNORECASE
)


@dataclass(frozen=True)
class TaskEnd:
    """How one task ended.

    Attributes:
        how: "Killed", "Exited with exit code 1", … as srun has it.
        at: seconds, of whichever clock.
    """

    rank: int
    node: str
    how: str
    at: float

    @property
    def signalled(self) -> str | None:
        """The signal it died of, as a key of ``SIGNALLED``."""
        how = self.how.lower().partition(" (")[0]
        return how if how in SIGNALLED else None

    @property
    def exit_code(self) -> int:
        """Its exit code; 128 + the number of a signal."""
        if self.signalled:
            return SIGNAL_CODES[self.signalled]
        found = re.search(r"exit code (\d+)", self.how)
        return int(found[1]) if found else 1


@dataclass(frozen=True)
class Diagnosis:
    """How an attempt ended; the attributes are those of `attempts.Record`."""

    cause: Cause
    exit_code: int
    rank: int | None = None
    node: str = ""
    symptom: str = ""
    evidence: str = ""
    advice: str = ""
    blames_node: bool = False


def task_ends(line: str, at: float) -> list[TaskEnd]:
    """What a line of srun's says about tasks: one entry a task."""
    found = SRUN_TASK.search(line)
    if not found:
        return []
    spans = (span.partition("-") for span in found["ranks"].split(","))
    ranks = [rank for low, _, high in spans for rank in range(int(low), int(high or low) + 1)]
    return [TaskEnd(rank, found["node"], found["how"].strip(), at) for rank in ranks]


def diagnose(
    ends: Sequence[TaskEnd],
    exit_code: int,
    failures: Sequence[Failure],
    tail: Callable[[int], list[str]],
    said: Sequence[str] = (),
    verdict: dict[str, object] | None = None,
) -> Diagnosis:
    """How an attempt ended.

    Args:
        ends: tasks that did not end with 0, in the order in which that became known.
        exit_code: srun's.
        failures: what ranks noted of themselves, earliest first.
        tail: the last lines of a rank's log.
        said: what srun and Slurm said.
        verdict: what the heartbeats' watchdog wrote in this attempt, of ranks that hang.
    """
    if not ends and (exit_code == SIGNAL_CODES["terminated"] or any(ABORTED.search(line) for line in said)):
        return Diagnosis(Cause.INTERRUPTED, RUN_AGAIN)  # Slurm ended the tasks before they had ended themselves
    if not ends and exit_code == FINISHED:
        return Diagnosis(Cause.FINISHED, 0)
    if not ends:
        return _without_tasks(exit_code, said)
    first = _first_to_fail(ends, failures, tail)
    code = first.exit_code
    noted = next((failure for failure in failures if failure.rank == first.rank), None)
    if verdict is not None and code in (RUN_AGAIN, 137, 143):
        return _hung(verdict, ends)
    if code == RUN_AGAIN:
        return Diagnosis(Cause.INTERRUPTED, code, first.rank, first.node)
    if noted and noted.error.startswith(UNHEALTHY):
        fault = noted.error.removeprefix(UNHEALTHY)
        advice = ADVICE["unhealthy node"]
        return Diagnosis(Cause.UNHEALTHY, code, first.rank, first.node, "unhealthy node", fault, advice, True)
    return _failed(first, noted, tail(first.rank), said)


def _failed(first: TaskEnd, noted: Failure | None, lines: list[str], said: Sequence[str]) -> Diagnosis:
    code = first.exit_code
    cause = {REFUSED: Cause.REFUSED, DIVERGED: Cause.DIVERGED}.get(code, Cause.CRASHED)
    if first.signalled:
        name, advice, blames = SIGNALLED[first.signalled]
        found = symptoms.recognise([*said, *lines])
        if found and found[0].name in ("out of memory on the host", "shared memory full"):
            symptom, line = found
            advice, blames = symptom.advice, symptom.blames_node
            return Diagnosis(cause, code, first.rank, first.node, symptom.name, line, advice, blames)
        return Diagnosis(cause, code, first.rank, first.node, name, f"task {first.rank}: {first.how}", advice, blames)
    refusal = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    stopped = next((line for line in reversed(lines) if "stopped at step" in line), "")
    if cause == Cause.DIVERGED:
        advice = ADVICE["diverged"]
        return Diagnosis(cause, code, first.rank, first.node, "diverged", stopped or "exit code 3", advice)
    error = noted.error if noted else ""
    evidence = error or (refusal if cause == Cause.REFUSED else "") or symptoms.last_exception(lines) or ""
    found = symptoms.recognise([evidence]) or (symptoms.recognise(lines) if cause == Cause.CRASHED else None)
    if found:
        symptom, line = found
        return Diagnosis(cause, code, first.rank, first.node, symptom.name, line, symptom.advice, symptom.blames_node)
    if cause == Cause.REFUSED:
        advice = ADVICE["refused"]
        return Diagnosis(cause, code, first.rank, first.node, "refused", evidence.removeprefix("error: "), advice)
    advice = ADVICE["exception"].format(rank=first.rank)
    name = "exception" if evidence else f"exit code {code}"
    return Diagnosis(cause, code, first.rank, first.node, name, evidence or first.how, advice)


def _first_to_fail(ends: Sequence[TaskEnd], failures: Sequence[Failure], tail: Callable[[int], list[str]]) -> TaskEnd:
    """The task that is to blame: the first, unless it only says that another went away."""
    first = ends[0]
    if not _echoes(first, failures, tail):
        return first
    for end in ends:  # of tasks that died at the same moment, one that a signal ended did not hear it from a peer
        if end.signalled not in (None, "terminated") and end.at - first.at < TOGETHER_SECONDS:
            return end
    for end in ends:
        if not end.signalled and end.exit_code != RUN_AGAIN and not _echoes(end, failures, tail):
            return end
    return first


def _echoes(end: TaskEnd, failures: Sequence[Failure], tail: Callable[[int], list[str]]) -> bool:
    if end.signalled:
        return end.signalled == "terminated"
    if end.exit_code in (REFUSED, DIVERGED, RUN_AGAIN):
        return False
    noted = [failure.error for failure in failures if failure.rank == end.rank]
    found = symptoms.recognise(noted) or symptoms.recognise(tail(end.rank))
    return found is not None and found[0].secondary


def _hung(verdict: dict[str, object], ends: Sequence[TaskEnd]) -> Diagnosis:
    ranks = verdict.get("ranks")
    rank = int(ranks[0]) if isinstance(ranks, list) and ranks else None
    node = next((end.node for end in ends if end.rank == rank), "")
    alone = isinstance(ranks, list) and len(ranks) == 1
    advice = ADVICE["hung"].format(rank=rank)
    return Diagnosis(Cause.HUNG, RUN_AGAIN, rank, node, "hung", str(verdict.get("sentence", "")), advice, alone)


def _without_tasks(exit_code: int, said: Sequence[str]) -> Diagnosis:
    """srun failed, and said nothing of a task: it could not start them, or a node went away."""
    errors = [line for line in said if "error" in line or "fatal" in line] or list(said)
    evidence = errors[0].strip() if errors else f"srun left with exit code {exit_code}"
    found = symptoms.recognise(errors)
    node = next((match["node"] for line in said if (match := SRUN_NODE.search(line))), "")
    if found:
        symptom, line = found
        return Diagnosis(Cause.CRASHED, exit_code, None, node, symptom.name, line, symptom.advice, bool(node))
    name = "a node went away" if node else "tasks did not start"
    return Diagnosis(Cause.CRASHED, exit_code, None, node, name, evidence, ADVICE[name], bool(node))


def verdict_since(run_folder: RunFolder, started: float) -> dict[str, object] | None:
    """What the watchdog of this attempt says of ranks that hang; None where none does."""
    file = run_folder.heartbeats / "verdict.json"
    with suppress(OSError):
        if file.stat().st_mtime >= started - 60:  # the file server's clock may differ; a start removes old ones
            return read_object(file)
    return None


def last_lines(file: Path, since: int = 0) -> list[str]:
    """The last lines of a log, not before the byte ``since``; empty where it cannot be read."""
    with suppress(OSError), file.open("rb") as log:
        log.seek(0, 2)
        log.seek(max(since, log.tell() - TAIL_BYTES))
        return log.read().decode(errors="replace").splitlines()
    return []
