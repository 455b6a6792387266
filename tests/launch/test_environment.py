"""What a job finds on its nodes: addresses, ports, GPUs of its own, and faults before training."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.environment import free_port, master_address
from launch.health.start import node_faults
from launch.job import environment_of
from refiner_ds.errors import LaunchError

GPU = "0, NVIDIA H100, 570.1, 81559, 4, 0, 0x0000000000000000, Disabled"  # as nvidia-smi's query prints it


def task(rank: int = 3, **more: Any) -> Any:
    known = {
        "global_rank": rank,
        "local_rank": rank % 2,
        "num_tasks": 4,
        "num_nodes": 2,
        "hostnames": ["node1", "node2"],
    }
    return SimpleNamespace(**known | more)


@pytest.fixture(autouse=True)
def meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINER_MASTER_PORT", "20007")
    for name in ("REFINER_MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world"),
    [("0,1", "1", "2"), ("1", "0", "1"), ("GPU-7f2", "0", "1"), ("", "1", "2")],
)
def test_a_task_that_sees_one_gpu_uses_that_one(
    visible: str, local_rank: str, local_world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = environment_of(task(), gpus=True)
    assert (given["LOCAL_RANK"], given["LOCAL_WORLD_SIZE"]) == (local_rank, local_world)
    assert (given["RANK"], given["WORLD_SIZE"], given["OMP_NUM_THREADS"]) == ("3", "4", "1")
    assert "CUDA_VISIBLE_DEVICES" not in given


def test_a_task_without_gpus_hides_those_it_sees_and_computes_on_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    given = environment_of(task(), gpus=False)
    assert (given["CUDA_VISIBLE_DEVICES"], given["LOCAL_RANK"], given["OMP_NUM_THREADS"]) == ("", "1", "6")


def test_ranks_meet_where_the_supervisor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_of(task(), gpus=False)["MASTER_ADDR"] == "node1"
    monkeypatch.setenv("REFINER_MASTER_ADDR", "10.0.0.7")
    given = environment_of(task(), gpus=False)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.7", "20007")


def test_every_restart_has_another_port_and_none_that_is_taken() -> None:
    ports = [free_port("12345", restart) for restart in range(20)]
    assert len(set(ports)) == 20 and all(20000 <= port < 30000 for port in ports)
    with socket.socket() as other:
        other.bind(("", ports[0]))
        other.listen()
        assert free_port("12345", 0) != ports[0]
    assert free_port("12345_7", 0) in range(20000, 30000)  # of a job array


def test_jobs_of_one_number_on_two_clusters_begin_at_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for cluster in ("one", "two"):
        monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
        ports |= {free_port("7", restart) for restart in range(3)}
    assert len(ports) == 6


def test_the_first_node_is_reached_by_name_address_or_interface() -> None:
    assert master_address("name") == socket.gethostname()
    assert master_address("lo") == "127.0.0.1"
    socket.inet_aton(master_address("address"))
    with pytest.raises(LaunchError, match="has no interface ib7 with an IPv4 address; it has .*lo"):
        master_address("ib7")


def planted(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """An nvidia-smi that answers so, before the real one."""
    tool = folder / "bin/nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def test_a_healthy_node_has_no_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, tmp_path, f"echo '{GPU}'; echo '1{GPU[1:]}'")
    assert node_faults(tmp_path, 2, workers=True) == []


def test_faults_of_a_node_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, tmp_path, f"echo '{GPU}'")
    assert node_faults(tmp_path, 2, workers=False) == ["1 of 2 GPUs answer"]
    planted(monkeypatch, tmp_path, "echo 'Unable to determine the device handle for GPU0: GPU is lost.'; exit 15")
    assert "GPU is lost" in node_faults(tmp_path, 2, workers=False)[0]
    planted(monkeypatch, tmp_path, f"echo '{GPU.replace(' 0, 0x', ' 7, 0x')}'")
    assert node_faults(tmp_path, 1, workers=False) == ["GPU 0 has had 7 uncorrected ECC errors"]
    assert "cannot be written" in node_faults(tmp_path / "absent", 0, workers=False)[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    faults = node_faults(tmp_path, 0, workers=True)
    assert faults[0] == "/dev/shm has 1 MB free, too little for the loader workers" and "has 1 MB free" in faults[1]
