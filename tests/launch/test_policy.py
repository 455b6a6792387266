"""What follows when the tasks of a job have ended: the table of launch/policy.py, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import policy
from launch.policy import Action, Attempt, Cause, Limits, decide

CRASH, HANG = Attempt(Cause.CRASHED, 137, "node2"), Attempt(Cause.HUNG, 75, "node2")
SAVED = Attempt(Cause.INTERRUPTED, 75, progress=True)
END, REQUEUE, WITHOUT = Action.END, Action.REQUEUE, Action.REQUEUE_WITHOUT_NODE
SPARE = Limits(spare_nodes=2)

TABLE = [
    # how it ended, the attempts before, limits, what is done, and a word of why
    (Attempt(Cause.FINISHED), [], Limits(), END, "finished"),
    (Attempt(Cause.FINISHED), [CRASH, CRASH], Limits(requeue=False, cancelled=True), END, "finished"),
    (Attempt(Cause.REFUSED, 2), [], SPARE, END, "refused"),
    (Attempt(Cause.DIVERGED, 3), [], SPARE, END, "diverged"),
    (SAVED, [], Limits(), REQUEUE, "interrupted"),
    (Attempt(Cause.INTERRUPTED, 75), [], Limits(), REQUEUE, "interrupted"),
    (SAVED, [], Limits(cancelled=True), END, "cancelled"),
    (CRASH, [], Limits(cancelled=True), END, "cancelled"),
    (SAVED, [], Limits(requeued=True), REQUEUE, "Slurm has requeued it"),
    (CRASH, [CRASH] * 9, Limits(requeued=True), REQUEUE, "Slurm has requeued it"),
    (SAVED, [], Limits(requeue=False), END, "requeue: false"),
    (SAVED, [SAVED] * 2, Limits(requeues=2), END, "2 times, which is all"),
    (SAVED, [SAVED] * 2, Limits(requeues=3), REQUEUE, "interrupted"),
    (SAVED, [SAVED, Attempt(Cause.LOST)], Limits(requeues=2), REQUEUE, "interrupted"),  # a lost node does not count
    (CRASH, [], SPARE, REQUEUE, "crashed with exit code 137"),
    (CRASH, [CRASH], Limits(spare_nodes=0), REQUEUE, "crashed"),
    (CRASH, [CRASH], SPARE, WITHOUT, "2 failures in a row began on node2"),
    (HANG, [CRASH], SPARE, WITHOUT, "node2"),
    (CRASH, [Attempt(Cause.CRASHED, 1, "node3")], SPARE, REQUEUE, "crashed"),
    (CRASH, [CRASH, SAVED], SPARE, REQUEUE, "crashed"),  # not in a row
    (Attempt(Cause.CRASHED, 1), [Attempt(Cause.CRASHED, 1)], SPARE, REQUEUE, "crashed"),  # no node is to blame
    (CRASH, [CRASH] * 2, SPARE, END, "3 times in a row it got no further than checkpoint step_00000007"),
    (HANG, [CRASH, HANG], SPARE, END, "no further"),
    (CRASH, [CRASH, CRASH, SAVED], SPARE, REQUEUE, "crashed"),
    (CRASH, [CRASH, Attempt(Cause.LOST)], SPARE, REQUEUE, "crashed"),
    (HANG, [], SPARE, REQUEUE, "hung"),
    (Attempt(Cause.UNHEALTHY, 1, "node2"), [], SPARE, WITHOUT, "node2 is not healthy"),
    (Attempt(Cause.UNHEALTHY, 1, "node2"), [], Limits(), REQUEUE, "unhealthy"),
    (Attempt(Cause.MISPLACED, 75, "node2"), [Attempt(Cause.UNHEALTHY, 1, "node2")], SPARE, WITHOUT, "without node2"),
    (CRASH, [CRASH, Attempt(Cause.MISPLACED, 75, "node3")], SPARE, WITHOUT, "node2"),  # nothing was tried in it
    (Attempt(Cause.UNHEALTHY, 1, "node4"), [Attempt(Cause.UNHEALTHY, 1, "node2"), CRASH], SPARE, END, "no further"),
]


@pytest.mark.parametrize("now, before, limits, action, why", TABLE)
def test_every_ending_has_its_decision(
    now: Attempt, before: list[Attempt], limits: Limits, action: Action, why: str
) -> None:
    decision = decide(now, before, limits, "step_00000007")
    assert (decision.action, why in decision.reason) == (action, True), decision
    assert decision.exit_code == now.exit_code
    assert decision.node == (now.node if action == WITHOUT else "")


def test_every_rule_decides_somewhere() -> None:
    deciding = {next(r for r in policy.RULES if r.applies(now, before, limits)) for now, before, limits, _, _ in TABLE}
    assert deciding == set(policy.RULES)


def test_the_docs_hold_the_table_as_it_is() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/cluster.md"
    assert policy.table() in page.read_text(), "print it anew with python -m launch.policy"


def test_a_cancelled_job_is_told_apart_from_one_that_failed() -> None:
    now = Attempt(Cause.INTERRUPTED, 75)
    assert decide(now, [], Limits(cancelled=True)).cancelled
    assert not decide(now, [], Limits(requeue=False)).cancelled
