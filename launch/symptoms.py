"""What the last lines of a failed rank mean: a table of the field's common failures, and what to do about each.

``launch/diagnosis.py`` decides which rank's lines to read; ``launch/jobs.py why`` prints the sentence. The table in
docs/cluster.md is printed by ``python -m launch.symptoms``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Symptom:
    """One kind of failure.

    Attributes:
        name: in two or three words.
        pattern: what its evidence looks like, searched line by line, case ignored.
        advice: what a person does about it.
        blames_node: whether the node may be at fault rather than the code or the recipe.
        secondary: a rank says this when another has died: that one is to blame.
    """

    name: str
    pattern: str
    advice: str
    blames_node: bool = False
    secondary: bool = False

    def find(self, lines: list[str]) -> str | None:
        """The first line that shows it."""
        found = re.compile(self.pattern, re.IGNORECASE)
        return next((line.strip() for line in lines if found.search(line)), None)


SYMPTOMS = (
    Symptom(
        "setup line failed",
        r"^launch: setup failed: ",
        "correct the line under setup in the cluster profile, and submit again",
    ),
    Symptom(
        "snapshot damaged",
        r"snapshot (was purged|is damaged)|its code has not appeared|No module named '?(launch|refiner_ds)\b",
        "submit the run again, which takes a new copy of the code; keep run folders where nothing purges old files",
    ),
    Symptom(
        "disk quota exceeded",
        r"disk quota exceeded|Errno 122\b",
        "delete or move files of yours, or have the quota raised, then requeue; the newest checkpoint is whole",
    ),
    Symptom(
        "disk full",
        r"no space left on device|Errno 28\b",
        "free space where the message says, or set refiner.run.output to another disk; the newest checkpoint is whole",
    ),
    Symptom(
        "out of memory on the host",
        r"out of memory: killed|oom[-_ ]kill|task.*: Out Of Memory$|^MemoryError|Cannot allocate memory",
        "raise mem_gb in the cluster profile, or lower refiner.data.workers",
    ),
    Symptom(
        "out of memory on the GPU",
        r"CUDA out of memory|OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY",
        "lower train_micro_batch_size_per_gpu, set refiner.model.checkpointing, or raise zero_optimization.stage",
    ),
    Symptom(
        "shared memory full",
        r"insufficient shared memory|DataLoader worker .* killed by signal: Bus error|bus error.*shm",
        "raise the size of /dev/shm on the node, or lower refiner.data.workers",
        blames_node=True,
    ),
    Symptom(
        "GPU fault",
        r"\bXid\b|uncorrectable ECC|CUDA error: (an illegal|unspecified|device-side|misaligned|hardware)"
        r"|GPU (has )?fallen off the bus|CUDA driver .*(error|insufficient)|no CUDA-capable device",
        "have the node's GPUs checked (nvidia-smi -q, dmesg); keep the job off it with sbatch: {exclude: NODE}",
        blames_node=True,
    ),
    Symptom(
        "port taken",
        r"address already in use|EADDRINUSE",
        "nothing: every restart uses another port",
    ),
    Symptom(
        "module missing",
        r"ModuleNotFoundError: |No module named ",
        "install the package into the environment that submits, where every node sees it",
    ),
    Symptom(
        "import failed",
        r"\bImportError: |cannot open shared object file|undefined symbol|GLIBC.* not found",
        "load the modules the environment was built with (setup in the cluster profile), or rebuild it",
    ),
    Symptom(
        "file system error",
        r"Stale file handle|Input/output error|Remote I/O error|Transport endpoint is not connected|Errno (5|116)\b",
        "check the file system on the node; the job restarts elsewhere when it fails there again",
        blames_node=True,
    ),
    Symptom(
        "permission denied",
        r"PermissionError|Permission denied|Read-only file system",
        "give the job's user the right to read the data and write the run folder on every node",
    ),
    Symptom(
        "checkpoint damaged",
        r"checkpoints?/step_\d+.*(bytes|missing|damaged|not the ones written|cannot be read)",
        "requeue it: a damaged checkpoint is skipped, and the run resumes from the one before",
    ),
    Symptom(
        "network between ranks",
        r"NCCL (error|WARN)(?!.*ncclRemoteError)|ncclSystemError|ncclInternalError|ibv_|IB timeout"
        r"|no route to host|Network is unreachable",
        "check NCCL_SOCKET_IFNAME in the cluster profile, and the link of the node that is named",
        blames_node=True,
    ),
    Symptom(
        "first node not reachable",
        r"(Name or service not known|Temporary failure in name resolution|The client socket has failed to connect"
        r"|getaddrinfo|DistNetworkError|DistStoreError)",
        "set master_addr to address, or to a network interface such as ib0, in the cluster profile",
        secondary=True,
    ),
    Symptom(
        "collective timed out",
        r"Watchdog caught collective|ProcessGroupNCCL.*(timeout|timed out)|Timed out waiting \d+ ?ms",
        "look for the rank that did not take part: its log ends earlier",
        secondary=True,
    ),
    Symptom(
        "another rank went away",
        r"connection (was )?(reset|closed|refused|aborted)|closed by (remote )?peer|broken pipe|socket closed"
        r"|remote process|ncclRemoteError|Read error \[|Gloo connectFullMesh|wait timeout",
        "look at the rank that failed first",
        secondary=True,
    ),
)
BY_NAME = {symptom.name: symptom for symptom in SYMPTOMS}

SIGNALLED = {
    "killed": ("killed", "see dmesg on the node: the kernel kills what takes too much memory (mem_gb)", True),
    "out of memory": ("out of memory on the host", BY_NAME["out of memory on the host"].advice, False),
    "segmentation fault": ("segmentation fault", "report it with the stacks in the rank's log", True),
    "bus error": ("bus error", "check /dev/shm and the disks of the node: a mapped file was cut", True),
    "aborted": ("aborted", "read the rank's log: a library gave up", True),
    "terminated": ("terminated", "find out who sent TERM to a single task", False),
    "illegal instruction": ("illegal instruction", "rebuild the environment for this node's CPU", True),
    "floating point exception": ("floating point exception", "report it with the stacks in the rank's log", False),
}


# What no line of a log shows; {rank} is filled in.
ADVICE = {
    "hung": "read the stacks in logs/rank_{rank}.stacks",
    "diverged": "lower refiner.recipe.lr, or set gradient_clipping",
    "refused": "correct what the sentence names, and submit again",
    "exception": "read the traceback in the log of rank {rank}",
    "unhealthy node": "have the node repaired; the job goes on without it",
    "supervisor killed": "raise mem_gb if memory was short",
    "tasks did not start": "ask Slurm's administrators what the line means",
    "a node went away": "see whether the node is up (sinfo -R)",
}


def recognise(lines: list[str]) -> tuple[Symptom, str] | None:
    """The failure that some lines show, one that is no echo of another rank's first, and the line that shows it."""
    for echo in (False, True):
        for symptom in SYMPTOMS:
            if symptom.secondary == echo and (line := symptom.find(lines)) is not None:
                return symptom, line
    return None


def last_exception(lines: list[str]) -> str | None:
    """The line that ends the last traceback: "RuntimeError: …"."""
    ending = re.compile(r"(\[rank\d+\]:\s*)?([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt|Exit): .+")
    return next((line.strip() for line in reversed(lines) if ending.match(line)), None)


def table() -> str:
    """What ``jobs.py why`` recognises and what it advises, in Markdown."""
    found = {symptom.name: symptom.advice for symptom in SYMPTOMS}
    found |= {name: advice for name, advice, _ in SIGNALLED.values() if name not in found}
    found |= {name: advice.format(rank="N") for name, advice in ADVICE.items()}
    rows = [f"| {name} | {advice} |" for name, advice in found.items()]
    return "\n".join(["| what failed | what to do |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
