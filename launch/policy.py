"""What happens when the tasks of a job have ended: one pure function, and the table it goes by.

    (how the attempt ended, the attempts before it, what the profile and the cluster allow) → Decision

The supervisor of a Slurm job and the controller of a local one obey. The table in docs/cluster.md is printed from
``RULES`` by ``python -m launch.policy``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

STUCK = 3  # attempts in a row without a new checkpoint, after which another would change nothing
CANCELLED = "it was cancelled"
NODE_STRIKES = 2  # failures in a row on one node, after which the job goes on without it


class Cause(StrEnum):
    """How the tasks of a job ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"  # asked to stop: time limit, preemption, a signal; saved if there was something to save
    HUNG = "hung"
    CRASHED = "crashed"
    UNHEALTHY = "unhealthy node"
    MISPLACED = "on a node to be left out"  # nothing was started: the job is to go on without one of its nodes
    LOST = "lost"  # the attempt's end was not seen: a node was lost, or the job was requeued from outside


class Action(StrEnum):
    """What the job does next."""

    END = "end"
    REQUEUE = "requeue"
    REQUEUE_WITHOUT_NODE = "requeue without the node"


@dataclass(frozen=True)
class Attempt:
    """One start of a job's tasks, from its beginning to their end.

    Attributes:
        cause: how it ended.
        exit_code: of the task that ended first; that of a signal is 128 + its number.
        node: where that task ran; empty where no node is to blame.
        progress: whether a checkpoint was written that was not there at its beginning.
    """

    cause: Cause
    exit_code: int = 0
    node: str = ""
    progress: bool = False


@dataclass(frozen=True)
class Limits:
    """What is allowed.

    Attributes:
        requeue: whether the profile lets the job be requeued at all.
        requeues: how often.
        cancelled: Slurm is ending the job for good, because of scancel.
        requeued: Slurm has requeued the job already.
        spare_nodes: nodes of the partition beside the job's own that could take the place of one.
    """

    requeue: bool = True
    requeues: int = 100
    cancelled: bool = False
    requeued: bool = False
    spare_nodes: int = 0


@dataclass(frozen=True)
class Decision:
    """What to do, and why in a sentence.

    Attributes:
        exit_code: that of the job where it ends.
        node: the one to go on without.
    """

    action: Action
    reason: str
    exit_code: int = 0
    node: str = ""

    @property
    def cancelled(self) -> bool:
        """Whether the job ends because a person cancelled it."""
        return self.reason == CANCELLED


@dataclass(frozen=True)
class Rule:
    """A row of the table; the first that applies decides.

    Attributes:
        when, then: in words, for the docs.
        applies: the same as a predicate on (this attempt, those before it, limits).
        reason: a sentence; {stuck}, {requeues}, {node}, {code} and {cause} are filled in.
    """

    when: str
    then: str
    applies: Callable[[Attempt, Sequence[Attempt], Limits], bool]
    action: Action
    reason: str


def _without_progress(now: Attempt, before: Sequence[Attempt]) -> int:
    """Attempts in a row, this one among them, that brought no new checkpoint and whose end was seen."""
    count = 0
    for attempt in (now, *reversed(before)):
        if attempt.progress:
            break
        count += attempt.cause not in (Cause.LOST, Cause.MISPLACED)
    return count


def _strikes(now: Attempt, before: Sequence[Attempt]) -> int:
    """Failures in a row that began on this attempt's node."""
    count = 0
    for attempt in (now, *reversed(before)):
        if attempt.cause == Cause.MISPLACED:
            continue  # nothing was tried in it
        if attempt.node != now.node:
            break
        count += 1
    return count


def _requeues(before: Sequence[Attempt]) -> int:
    return sum(attempt.cause != Cause.LOST for attempt in before)


RULES = (
    Rule(
        "training finished (exit code 0)",
        "the job ends",
        lambda now, before, limits: now.cause == Cause.FINISHED,
        Action.END,
        "finished",
    ),
    Rule(
        "training is refused (2): the run file, the data, the code or a `setup` line",
        "the job ends; a person corrects it",
        lambda now, before, limits: now.cause == Cause.REFUSED,
        Action.END,
        "it was refused, and would be again",
    ),
    Rule(
        "the loss or a weight is not finite (3)",
        "the job ends; a person changes the recipe",
        lambda now, before, limits: now.cause == Cause.DIVERGED,
        Action.END,
        "it diverged, and would again",
    ),
    Rule(
        "`scancel`",
        "all ranks save if `KillWait` leaves them the time; the job ends",
        lambda now, before, limits: limits.cancelled,
        Action.END,
        CANCELLED,
    ),
    Rule(
        "`scontrol requeue`, preemption, or a lost node: Slurm has requeued the job",
        "it resumes from the newest complete checkpoint",
        lambda now, before, limits: limits.requeued,
        Action.REQUEUE,
        "Slurm has requeued it",
    ),
    Rule(
        "the profile has `requeue: false`",
        "the job ends",
        lambda now, before, limits: not limits.requeue,
        Action.END,
        "its profile does not let it (requeue: false)",
    ),
    Rule(
        "it has requeued itself `requeues` times",
        "the job ends",
        lambda now, before, limits: _requeues(before) >= limits.requeues,
        Action.END,
        "it has requeued itself {requeues} times, which is all its profile allows (requeues)",
    ),
    Rule(
        f"{STUCK} attempts in a row brought no new checkpoint",
        "the job ends",
        lambda now, before, limits: _without_progress(now, before) >= STUCK,
        Action.END,
        "{stuck} times in a row it got no further than checkpoint {checkpoint}",
    ),
    Rule(
        "the check of a node at the job's start finds a fault, and the partition has another node",
        "requeued without that node",
        lambda now, before, limits: now.cause == Cause.UNHEALTHY and limits.spare_nodes > 0,
        Action.REQUEUE_WITHOUT_NODE,
        "{node} is not healthy",
    ),
    Rule(
        "a job begins on a node that it has been requeued without, since Slurm acted too late (twice at most)",
        "requeued without that node, before anything is trained",
        lambda now, before, limits: now.cause == Cause.MISPLACED,
        Action.REQUEUE_WITHOUT_NODE,
        "it is to go on without {node}",
    ),
    Rule(
        f"{NODE_STRIKES} failures in a row began on the same node, and the partition has another",
        "requeued without that node",
        lambda now, before, limits: bool(now.node) and _strikes(now, before) >= NODE_STRIKES and limits.spare_nodes > 0,
        Action.REQUEUE_WITHOUT_NODE,
        "{strikes} failures in a row began on {node}",
    ),
    Rule(
        "the time limit comes near (`signal_seconds` before, USR2), preemption with a grace time, USR2 or TERM by hand",
        "all ranks finish the step and save together; requeued",
        lambda now, before, limits: now.cause == Cause.INTERRUPTED,
        Action.REQUEUE,
        "it was interrupted",
    ),
    Rule(
        "a rank hangs: no progress for `refiner.run.hang_seconds`",
        "stacks of all ranks are written; requeued",
        lambda now, before, limits: now.cause == Cause.HUNG,
        Action.REQUEUE,
        "a rank hung",
    ),
    Rule(
        "a rank crashes: killed, out of memory, an NCCL or CUDA error, a taken port, an exception",
        "the other ranks are ended; requeued",
        lambda now, before, limits: True,
        Action.REQUEUE,
        "it {cause} with exit code {code}",
    ),
)


def decide(now: Attempt, before: Sequence[Attempt], limits: Limits, checkpoint: str = "none") -> Decision:
    """What a job does after an attempt.

    Args:
        now: the attempt that has just ended.
        before: those before it, oldest first.
        checkpoint: name of the newest checkpoint, for the sentence.
    """
    rule = next(rule for rule in RULES if rule.applies(now, before, limits))
    reason = rule.reason.format(
        stuck=STUCK,
        requeues=limits.requeues,
        node=now.node,
        strikes=_strikes(now, before),
        code=now.exit_code,
        cause=now.cause,
        checkpoint=checkpoint,
    )
    without = now.node if rule.action == Action.REQUEUE_WITHOUT_NODE else ""
    return Decision(rule.action, reason, now.exit_code, without)


def table() -> str:
    """The rules in Markdown."""
    rows = ["| what happens | what the job does |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| {rule.when} | {rule.then} |" for rule in RULES)])


if __name__ == "__main__":
    print(table())
