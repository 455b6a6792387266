"""The rank that failed first is named, though others say more; and what it failed of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import symptoms
from launch.attempts import Failure
from launch.diagnosis import Diagnosis, TaskEnd, diagnose, task_ends
from launch.policy import Cause

RESET = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.2]:4153"
STORE = "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed."


def ends(*lines: str, apart: float = 0.1) -> list[TaskEnd]:
    return [end for number, line in enumerate(lines) for end in task_ends(f"srun: error: {line}", number * apart)]


def judge(
    ends: Sequence[TaskEnd], code: int = 1, logs: dict[int, str] | None = None, said: Sequence[str] = (), **more: object
) -> Diagnosis:
    failures = [Failure(rank, f"node{rank + 1}", 1, text, float(rank)) for rank, text in more.get("noted", {}).items()]  # type: ignore[attr-defined]
    tails = {rank: text.splitlines() for rank, text in (logs or {}).items()}
    return diagnose(ends, code, failures, lambda rank: tails.get(rank, []), said, more.get("verdict"))  # type: ignore[arg-type]


def test_lines_of_srun_are_read_with_all_their_tasks() -> None:
    found = ends("node1: tasks 0-1,3: Terminated", "node2: task 12: Segmentation fault (core dumped)")
    assert [(end.rank, end.node, end.signalled, end.exit_code) for end in found] == [
        *((rank, "node1", "terminated", 143) for rank in (0, 1, 3)),
        (12, "node2", "segmentation fault", 139),
    ]
    assert ends("node1: task 2: Exited with exit code 75")[0].exit_code == 75
    assert task_ends("srun: launch/slurm: _step_signal: Terminating StepId=4.0", 0.0) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("echo", [RESET, STORE, "RuntimeError: NCCL error: ncclRemoteError: remote process exited"])
def test_a_killed_rank_outranks_the_peers_that_heard_of_it(order: tuple[int, int], echo: str) -> None:
    lines = ("node1: task 0: Exited with exit code 1", "node2: task 1: Killed")
    found = judge(ends(*(lines[i] for i in order)), 137, noted={0: echo})
    assert (found.cause, found.rank, found.node, found.exit_code) == (Cause.CRASHED, 1, "node2", 137)
    assert found.blames_node and found.evidence == "task 1: Killed"


def test_a_rank_that_srun_killed_later_is_not_to_blame() -> None:
    found = judge(ends("node1: task 0: Exited with exit code 1", "node2: task 1: Killed", apart=30), noted={0: RESET})
    assert found.rank == 0


def test_an_exception_outranks_the_peers_that_heard_of_it() -> None:
    lines = ("node1: tasks 0,2-3: Exited with exit code 1", "node2: task 1: Exited with exit code 1")
    noted = {0: RESET, 1: "ValueError: a real one", 2: RESET, 3: RESET}
    found = judge(ends(*lines), noted=noted)
    assert (found.rank, found.evidence, found.blames_node) == (1, "ValueError: a real one", False)


def test_of_an_earlier_attempts_log_nothing_counts() -> None:
    assert judge(ends("node1: task 0: Exited with exit code 1")).evidence == "Exited with exit code 1"


@pytest.mark.parametrize(
    "code, log, cause, evidence",
    [
        (2, "error: /data/train: shard-000003.tar is cut", Cause.REFUSED, "/data/train: shard-000003.tar is cut"),
        (3, "stopped at step 40: the loss is nan", Cause.DIVERGED, "stopped at step 40: the loss is nan"),
        (75, "", Cause.INTERRUPTED, ""),
    ],
)
def test_exit_codes_of_training_say_how_it_ended(code: int, log: str, cause: Cause, evidence: str) -> None:
    found = judge(ends(f"node1: task 0: Exited with exit code {code}"), code, {0: log})
    assert (found.cause, found.exit_code, found.evidence) == (cause, code, evidence)


def test_a_hang_is_told_from_an_interruption_by_the_watchdogs_verdict() -> None:
    verdict = {"ranks": [1], "sentence": "no progress for 60 s: rank 1 (process 7 on node2; step 40, forward)", "by": 0}
    lines = ("node1: task 0: Exited with exit code 75", "node2: task 1: Killed")
    found = judge(ends(*lines), 137, verdict=verdict)
    assert (found.cause, found.rank, found.node, found.blames_node) == (Cause.HUNG, 1, "node2", True)
    assert "step 40" in found.evidence and "rank_1.stacks" in found.advice
    everyone = judge(ends(*lines), verdict={"ranks": [0, 1], "sentence": "they wait for each other", "by": 0})
    assert everyone.cause == Cause.HUNG and not everyone.blames_node


def test_tasks_that_never_started_are_told_by_sruns_words() -> None:
    said = ["srun: error: Task launch for StepId=3.0 failed on node node4: Communication connection failure"]
    found = judge([], 1, said=said)
    assert (found.cause, found.node, found.blames_node) == (Cause.CRASHED, "node4", True)
    assert judge([], 0).cause == Cause.FINISHED


def test_tasks_that_slurm_ended_have_not_finished_though_srun_says_zero() -> None:
    said = ["srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", "srun: forcing job termination"]
    assert judge([], 0, said=said).cause == Cause.INTERRUPTED


def test_an_srun_that_slurm_ended_before_it_could_say_so_was_interrupted() -> None:
    assert judge([], 143).cause == Cause.INTERRUPTED
    assert judge([], 137).cause == Cause.CRASHED


@pytest.mark.parametrize(
    "line, symptom, node",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory on the GPU", False),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "GPU fault", True),
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus", "GPU fault", True),
        ("RuntimeError: NCCL error: unhandled system error, ncclSystemError", "network between ranks", True),
        ("OSError: [Errno 98] Address already in use", "port taken", False),
        ("ModuleNotFoundError: No module named 'timm'", "module missing", False),
        ("ImportError: libcudart.so.12: cannot open shared object file", "import failed", False),
        ("OSError: [Errno 28] No space left on device: '/runs/x'", "disk full", False),
        ("OSError: [Errno 122] Disk quota exceeded: '/runs/x'", "disk quota exceeded", False),
        ("OSError: [Errno 116] Stale file handle: '/data'", "file system error", True),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "shared memory full", True),
        ("PermissionError: [Errno 13] Permission denied: '/runs'", "permission denied", False),
        ("socket.gaierror: [Errno -2] Name or service not known", "first node not reachable", False),
    ],
)
def test_common_failures_are_recognised(line: str, symptom: str, node: bool) -> None:
    log = {0: f"Traceback (most recent call last):\n{line}\nsubmitit ERROR Submitted job triggered an exception"}
    found = judge(ends("node1: task 0: Exited with exit code 1"), 1, log)
    assert (found.symptom, found.evidence, found.blames_node) == (symptom, line, node)
    assert found.advice


def test_the_kernels_out_of_memory_is_told_from_other_kills() -> None:
    said = ["slurmstepd-node2: error: Detected 1 oom-kill event(s) in StepId=3.0. Some tasks were OOM Killed."]
    found = judge(ends("node2: task 1: Out Of Memory"), 137, said=said)
    assert (found.symptom, found.rank, found.blames_node) == ("out of memory on the host", 1, False)
    assert "mem_gb" in found.advice


def test_the_docs_hold_the_table_as_it_is() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/cluster.md"
    assert symptoms.table() in page.read_text(), "print it anew with python -m launch.symptoms"


@pytest.mark.parametrize("why", ["Job is pending execution", "Job/step already completing or completed"])
def test_a_job_that_slurm_requeued_or_ended_before_its_tasks_began_was_interrupted(why: str) -> None:
    assert judge([], 1, said=[f"srun: error: Unable to create step for job 44: {why}"]).cause == Cause.INTERRUPTED
    refused = "srun: error: Unable to create step for job 44: Requested node configuration is not available"
    assert judge([], 1, said=[refused]).cause == Cause.CRASHED
