"""The batch script a submission writes, to the letter; golden/batch.sh is written anew with REWRITE_GOLDEN=1."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.cluster import ClusterProfile

GOLDEN = Path(__file__).with_name("golden")
FULL = ClusterProfile(
    partition="gpu",
    account="vision",
    qos="long",
    constraint="a100|h100",
    hours=24,
    signal_seconds=300,
    gpus_per_node=8,
    cpus_per_task=12,
    mem_gb=900.5,
    setup=["module load cuda/12.4"],
    environment={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $HOME"},
    sbatch={"reservation": "maths", "exclusive": True},
)


@pytest.fixture
def script_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    srun = tmp_path / "srun"  # submitit makes no executor without one
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def script(profile: ClusterProfile, gpus: int, tasks: int) -> str:
        folder = Path("/shared/runs/refiner_s")
        made = slurm.executor(
            profile, nodes=4, gpus=gpus, tasks=tasks, run_folder=folder, code=folder / "code"
        )  # fmt: skip
        return slurm.script(made).replace(shlex.quote(sys.executable), "<python>")

    return script


@pytest.mark.parametrize("name", ["batch", "batch_cpu"])
def test_the_batch_script_is_the_recorded_one(script_of, name: str) -> None:  # type: ignore[no-untyped-def]
    made = script_of(FULL, 8, 8) if name == "batch" else script_of(ClusterProfile(tasks_per_node=2), 0, 2)
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("REWRITE_GOLDEN"):
        golden.write_text(made)
    assert made == golden.read_text()


@pytest.mark.parametrize(
    ("partition", "listed", "gpus"),
    [
        (None, "main* gpu:8\nbig gpu:16\n", 8),
        ("big", "big gpu:a100:4(S:0-1)\n", 4),
        ("mixed", "mixed gpu:a100:4,gpu:t4:2,shard:16\n", 6),
        ("cpu", "cpu (null)\n", 0),
        ("low", "low gpu:2\nlow gpu:4\n", "nodes of partition low have 2 or 4 GPUs"),
        ("none", "", "Slurm knows no node of partition none"),
        (None, "big gpu:8\n", "Slurm knows no node of the default partition"),
    ],
)
def test_gpus_of_a_node_are_those_slurm_counts(
    monkeypatch: pytest.MonkeyPatch, partition: str | None, listed: str, gpus: int | str
) -> None:
    monkeypatch.setattr(slurm, "ask", lambda *_: slurm.subprocess.CompletedProcess((), 0, listed, ""))
    if isinstance(gpus, int):
        assert slurm.gpus_of_nodes(partition) == gpus
    else:
        with pytest.raises(slurm.LaunchError, match=gpus):
            slurm.gpus_of_nodes(partition)
