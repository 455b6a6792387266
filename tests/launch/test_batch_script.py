"""The batch script a submission writes, to the letter; golden/batch.sh is written anew with REWRITE_GOLDEN=1."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import slurm
from launch.allocation import Allocation, on_slurm
from launch.batch import Executor, submission_environment
from launch.cluster import ClusterProfile
from launch.slurm import Nodes
from refiner_ds.config import RunFile, load

GOLDEN = Path(__file__).with_name("golden")
FULL = ClusterProfile(
    partition="gpu",
    account="vision",
    qos="long",
    constraint="a100|h100",
    time="1-00:00:00",
    signal_seconds=300,
    requeue=False,
    gpus_per_node="h100:8",
    cpus_per_task=12,
    mem_gb=900.5,
    setup=["module load cuda/12.4"],
    environment={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $HOME"},
    sbatch={"reservation": "maths", "exclusive": False, "exclude": "node7"},
    srun={"cpu-bind": "cores", "mpi": "none", "label": True},
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFile:
    srun = tmp_path / "srun"  # submitit makes no executor without one
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return load(None, ["refiner.run.output=/shared/runs", "refiner.run.name=refiner_s"])


@pytest.mark.parametrize("name", ["batch", "batch_cpu"])
def test_the_batch_script_is_the_recorded_one(name: str, run: RunFile) -> None:
    if name == "batch":
        executor = Executor(Allocation(run, FULL, 4, 8, False, 12, 922112), exclude="node9", dependency="afterok:7")
    else:
        executor = Executor(Allocation(run, ClusterProfile(tasks_per_node=2), 4, 0, False, None, 0))
    made = executor.script().replace(shlex.quote(sys.executable), "<python>")
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("REWRITE_GOLDEN"):
        golden.write_text(made)
    assert made == golden.read_text()
    assert subprocess.run(("bash", "-n"), input=made, text=True).returncode == 0


@pytest.mark.parametrize(
    ("partition", "gpu_type", "listed", "found"),
    [
        (None, None, "main*|gpu:8|96|1000|infinite|n/a\nbig|gpu:16|8|8|infinite|n/a\n", ((8,), 96, 1000)),
        ("big", None, "big|gpu:a100:4(S:0-1)|64+|512000+|infinite|n/a\n", ((4,), 64, 512000)),
        ("mixed", None, "mixed|gpu:a100:4,gpu:t4:2,shard:16|8|8|infinite|n/a\n", ((6,), 8, 8)),
        (
            "mixed",
            "a100",
            "mixed|gpu:a100:4,gpu:t4:2,shard:16|8|8|infinite|n/a\nmixed|gpu:t4:8|4|4|infinite|n/a\n",
            ((4,), 8, 8),
        ),
        ("cpu", None, "cpu|(null)|8|8|infinite|n/a\n", ((0,), 8, 8)),
        ("low", None, "low|gpu:2|8|8|infinite|n/a\nlow|gpu:4|4|16|infinite|n/a\n", ((2, 4), 4, 8)),
        ("mixed", "h100", "mixed|gpu:a100:4|8|8|infinite|n/a\n", "no node of partition mixed has GPUs of type h100"),
        ("none", None, "", "Slurm knows no node of partition none"),
        (None, None, "big|gpu:8|8|8|infinite|n/a\n", "Slurm knows no node of the default partition"),
    ],
)
def test_what_a_node_has_is_what_slurm_counts(
    monkeypatch: pytest.MonkeyPatch, partition: str | None, gpu_type: str | None, listed: str, found: object
) -> None:
    lines = "".join(f"{line}|up|idle|node{i}|none\n" for i, line in enumerate(listed.splitlines()))
    monkeypatch.setattr(slurm, "ask", lambda *_: subprocess.CompletedProcess((), 0, lines, ""))
    if isinstance(found, tuple):
        has = slurm.nodes_of(partition, gpu_type)
        assert (has.gpus, has.cpus, has.mem_mb) == found
    else:
        with pytest.raises(slurm.LaunchError, match=str(found)):
            slurm.nodes_of(partition, gpu_type)


@pytest.mark.parametrize(
    ("listed", "gpu_type", "limit", "default"),
    [
        ("p|gpu:h100:8(S:0-1)|8|8|1-00:00:00|2:00:00\n", "h100", 1440, 120),
        ("p|gpu:a100:4|8|8|30:00|n/a\np|gpu:t4:2|8|8|30:00|n/a\n", "", 30, None),
        ("p|gpu:8|8|8|infinite|n/a\n", "", None, None),
    ],
)
def test_a_partition_says_how_long_a_job_may_take_and_which_gpus_it_has(
    monkeypatch: pytest.MonkeyPatch, listed: str, gpu_type: str, limit: int | None, default: int | None
) -> None:
    lines = "".join(f"{line}|up|idle|node{i}|none\n" for i, line in enumerate(listed.splitlines()))
    monkeypatch.setattr(slurm, "ask", lambda *_: subprocess.CompletedProcess((), 0, lines, ""))
    has = slurm.nodes_of("p")
    assert (has.gpu_type, has.limit, has.default_limit) == (gpu_type, limit, default)


@pytest.mark.parametrize(
    ("profile", "has", "tasks", "cores", "memory"),
    [
        ({}, ((8,), 96, 1000_000), 8, 12, 0),  # all GPUs: all memory
        ({"gpus_per_node": 2}, ((8,), 96, 1000_000), 2, 12, 250_000),  # a quarter of the node
        ({"gpus_per_node": "h100:8"}, ((8,), 100, 1000_000), 8, 12, 0),
        ({"gpus_per_node": 0, "tasks_per_node": 4}, ((0,), 64, 1000_000), 4, 16, 0),
        ({"gpus_per_node": 0}, ((8,), 64, 1), 1, 64, None),  # a site that does not tell Slurm its nodes' memory
        ({"cpus_per_task": 3, "mem_gb": 10}, ((8,), 96, 1000_000), 8, 3, 10240),
        ({}, ((0,), 96, 1000), "have no GPUs; name another --partition, or train on CPU with --gpus-per-node 0", 0, 0),
        ({}, ((2, 4), 96, 1000), "nodes of the partition have 2 or 4 GPUs; say how many", 0, 0),
        ({"gpus_per_node": 9}, ((8,), 96, 1000), "have 8 GPUs, not 9", 0, 0),
    ],
)
def test_cores_and_memory_are_the_share_of_the_gpus(
    run: RunFile, profile: dict[str, Any], has: tuple[Any, int, int], tasks: object, cores: int, memory: int | None
) -> None:
    nodes = Nodes("the partition", *has)
    known = ClusterProfile(**profile)
    if isinstance(tasks, str):
        with pytest.raises(slurm.LaunchError, match=tasks):
            on_slurm(run, known, 2, nodes)
        return
    made = on_slurm(run, known, 2, nodes)
    assert (made.tasks, made.cpus_per_task, made.mem_mb) == (tasks, cores, memory)


def test_too_few_cores_for_the_loader_are_warned_of(run: RunFile) -> None:
    workers = run.refiner.data.workers
    enough = Allocation(run, ClusterProfile(), 1, 8, False, workers + 1)
    few = Allocation(run, ClusterProfile(), 1, 8, False, workers)
    assert enough.warnings() == []
    assert workers == 0 or f"raise cpus_per_task to {workers + 1}" in few.warnings()[0]


def test_a_submission_takes_nothing_of_the_allocation_it_is_typed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --partition=gpu\n#SBATCH --time=60\n#SBATCH --mem=0\n"
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "SBATCH_RESERVATION": "r", "NCCL_DEBUG": "INFO"}
    for name in ("SLURM_MEM_PER_CPU", "SLURM_GPUS_PER_NODE", "SLURM_JOB_ID", "SLURM_NTASKS", "PMI_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("PARTITION", "TIMELIMIT", "MEM_PER_NODE", "ARRAY_INX", "NO_REQUEUE"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    given = submission_environment(script)
    assert {name: given[name] for name in given if name.startswith(("SLURM", "SBATCH", "PMI", "NCCL"))} == kept
