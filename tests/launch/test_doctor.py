"""doctor.py finds what is wrong with nodes: every planted fault is a finding that names the node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch import doctor
from launch.health import probe
from launch.health.findings import Finding, Requirements, examine
from launch.health.gather import Reports, run_tasks
from launch.health.node import GIB, MIB, Folder, Gpu, Node, nvidia_gpus
from launch.health.shared import Shared
from refiner_ds.memory import free_memory
from tests.slurm.cluster import SlurmCluster

NEEDS = Requirements(gpus=2, workers=3, images_per_second=1000)
GPUS = [Gpu(index, "NVIDIA H100 80GB HBM3", 81559, 4, 0, "", False) for index in range(2)]
FOLDER = Folder("/shared/runs", "", 500 * GIB, 10**8, -1, 400e6)
VERSIONS = {"python": "3.11.7", "torch": "2.14.1", "NVIDIA driver": "580.65", "refiner_ds": "/shared/clone/refiner_ds"}
LINK = {"all": 2e10, "within": 2e11, "between": 2e10}


def sound(hosts: int = 4) -> Reports:
    """Reports of nodes with two tasks each, of which nothing is wrong."""
    reports = Reports(2 * hosts)
    for rank in range(2 * hosts):
        host = f"node{rank // 2 + 1}"
        cores = list(range(8 * (rank % 2), 8 * (rank % 2) + 8))
        reports.nodes[rank] = Node(
            rank, host, cores, 200 * GIB, 60 * GIB, 65536, 700.0, FOLDER, list(GPUS), "", dict(VERSIONS)
        )
        links = {f"node{one}–node{one % hosts + 1}": 2e10 for one in range(1, hosts + 1) if str(one) in host}
        links |= {
            f"node{one}–node{one % hosts + 1}": 2e10 for one in range(1, hosts + 1) if str(one % hosts + 1) in host
        }
        shared = Shared(rank, host, lock="held", backend="nccl", rates={"within": 2e11, "all": 2e10})
        reports.shared[rank] = replace(shared, rates=LINK | links) if rank % 2 == 0 else shared
    return reports


def test_sound_nodes_have_no_findings() -> None:
    assert examine(sound(), NEEDS) == []
    assert examine(sound(1), NEEDS) == []


def node(**changes: object) -> Callable[[Reports], None]:
    """Plant a fault in what both tasks of the third node measured."""

    def plant(reports: Reports) -> None:
        for rank in (4, 5):
            reports.nodes[rank] = replace(reports.nodes[rank], **changes)  # type: ignore[arg-type]

    return plant


def folder(**changes: object) -> Callable[[Reports], None]:
    return node(folder=replace(FOLDER, **changes))  # type: ignore[arg-type]


def gpu(**changes: object) -> Callable[[Reports], None]:
    return node(gpus=[GPUS[0], replace(GPUS[1], **changes)])  # type: ignore[arg-type]


def version(name: str, found: str) -> Callable[[Reports], None]:
    return node(versions=VERSIONS | {name: found})


def shared(**changes: object) -> Callable[[Reports], None]:
    """Plant a fault in what the leader of the third node found out."""

    def plant(reports: Reports) -> None:
        reports.shared[4] = replace(reports.shared[4], **changes)  # type: ignore[arg-type]

    return plant


def slow_card(reports: Reports) -> None:
    for rank in (2, 4, 6):
        rates = {name: 1e9 if "node3" in name else rate for name, rate in reports.shared[rank].rates.items()}
        reports.shared[rank] = replace(reports.shared[rank], rates=rates)


def dead(reports: Reports) -> None:
    del reports.nodes[4], reports.shared[4]
    reports.stderr[4] = "ModuleNotFoundError: No module named 'launch'"


def hung(reports: Reports) -> None:
    del reports.shared[4]
    reports.ended = False


PLANTED: dict[str, tuple[Callable[[Reports], None], bool, str]] = {
    "few cores": (node(cores=[0, 1]), False, "1 cores for a process with 3 loader workers"),
    "cores too slow": (node(decode_rate=300.0, cores=[0, 1, 2, 3, 4, 5, 6, 7]), False, "decode 900 images/s"),
    "a slow node": (node(decode_rate=340.0), False, "decodes 340.0 images/s, other nodes 700.0"),
    "little memory": (node(memory=3 * GIB), True, "3.0 GiB of memory for 2 processes"),
    "small /dev/shm": (node(shared_memory=64 * MIB), True, "/dev/shm has 64 MiB free for 2 processes"),
    "few files": (node(open_files=256), True, "may open 256 files"),
    "unwritable": (folder(error="Read-only file system"), True, "cannot be written (Read-only file system)"),
    "full disk": (folder(free=GIB // 2), True, "its disk has 0.5 GiB for checkpoints"),
    "nearly full disk": (folder(free=9 * GIB), False, "its disk has 9.0 GiB for checkpoints"),
    "quota": (folder(quota_left=GIB // 4), True, "your quota leaves 0.2 GiB"),
    "no inodes": (folder(free_inodes=12), True, "room for 12 more files"),
    "slow disk": (folder(write_rate=8 * MIB), False, "writes 8 MiB/s"),
    "lost GPU": (node(gpus=GPUS[:1]), True, "1 GPUs where 2 are wanted"),
    "dead GPU": (node(gpu_error="nvidia-smi says: GPU is lost"), True, "GPU is lost; have the node drained"),
    "ECC errors": (gpu(ecc_errors=3), True, "GPU 1 has 3 uncorrectable memory errors"),
    "hot GPU": (gpu(slowed_by="heat"), False, "GPU 1 is slowed down by heat"),
    "GPU in use": (gpu(used=40_000), False, "GPU 1 has 40,000 MiB in use by another process"),
    "MIG": (gpu(mig=True), False, "GPU 1 is split by MIG"),
    "another GPU": (gpu(name="NVIDIA A100"), False, "the GPU is NVIDIA H100 80GB HBM3, NVIDIA A100 here"),
    "another driver": (version("NVIDIA driver", "550.54"), True, "NVIDIA driver is 550.54 here and 580.65 on 3"),
    "another torch": (version("torch", "2.6.0"), True, "torch is 2.6.0 here and 2.14.1 on 3 other nodes"),
    "another clone": (version("refiner_ds", "/home/x"), True, "refiner_ds is /home/x here"),
    "data": (node(data_error="/data/train: no such folder"), True, "the data cannot be read here: /data/train"),
    "clock": (shared(clock_ahead=-40.0, clock_margin=0.01), False, "its clock is 40.0 s behind the first node's"),
    "folder not shared": (shared(unseen=["node1"], lock="ignored"), True, "does not see what node1 wrote"),
    "stale folder": (shared(stale=True), True, "still reads the old contents"),
    "no locks between nodes": (shared(lock="ignored"), True, "does not respect another node's file lock"),
    "no locks": (shared(lock="No locks available"), True, "cannot lock files in the run folder (No locks available)"),
    "no interface": (shared(unmet="master_addr: node3 has no interface ib7"), True, "has no interface ib7"),
    "unreachable": (shared(error="cannot reach node1 port 20007"), True, "cannot reach node1 port 20007; see that"),
    "all-reduce": (shared(reduce_error="NCCL error: remote"), True, "an all-reduce over nccl fails: NCCL error"),
    "slow network": (shared(rates=LINK | {"between": 1e8}), False, "reduces at 0.8 Gbit/s with the other nodes"),
    "slow card": (slow_card, False, "reduces with its neighbours at 8.0 Gbit/s where other nodes reach"),
    "slow NVLink": (shared(rates=LINK | {"within": 1e10}), False, "reduces between its own GPUs at 10.0 GB/s"),
    "does not start": (dead, True, "rank 4 does not start: ModuleNotFoundError"),
    "hangs": (hung, True, "rank 4 hangs where all ranks work together"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_the_one_finding(fault: str) -> None:
    plant, serious, says = PLANTED[fault]
    reports = sound()
    plant(reports)
    (finding,) = [found for found in examine(reports, NEEDS) if says in found.what]
    assert finding.serious is serious
    assert finding.hosts == (("node3",) if fault != "does not start" else ())
    assert all(set(found.hosts) <= {"node3"} for found in examine(reports, NEEDS))  # it may have other consequences
    assert "\n" not in str(finding) and str(finding).startswith("error: " if serious else "warning: ")


def test_the_same_fault_of_several_nodes_is_one_finding() -> None:
    reports = sound()
    for rank in reports.nodes:
        reports.nodes[rank] = replace(reports.nodes[rank], open_files=256)
    (finding,) = examine(reports, NEEDS)
    assert finding.hosts == ("node1", "node2", "node3", "node4")


SITE = """
import fcntl, os, time
if os.environ.get("PLANT") == "clock":
    real = time.time
    time.time = lambda: real() + 90.0
if os.environ.get("PLANT") == "locks":
    fcntl.flock = lambda file, operation: None
"""
SMI = """#!/bin/sh
case "$*" in
*driver_version\\ *|*=driver_version*) echo 550.54;;
*) echo "0, NVIDIA H100 80GB HBM3, 550.54, 81559, 3, 2, 0x0000000000000040, Disabled"
   echo "Unable to determine the device handle for GPU1: GPU is lost" ; exit 15;;
esac
"""
QUOTA = """#!/bin/sh
echo 'Disk quotas for user me (uid 7):'
echo '     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace'
echo '     nas:/home  900000* 800000 1000000   6days      12       0       0'
"""


def planted_nodes(tmp_path: Path) -> tuple[list[list[str]], list[dict[str, str]]]:
    """Commands and environments of four nodes of this machine, of which three have faults of their own."""
    probe = [sys.executable, "-m", "launch.health.probe", "--folder", str(tmp_path / "runs")]
    (tmp_path / "site" / "deepspeed-0.1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "deepspeed-0.1.0.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.1.0\n")
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "quota").write_text(QUOTA)
    for program in ("nvidia-smi", "quota"):
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "runs").mkdir()
    mounts = f"mount -t tmpfs -o size=16m shm /dev/shm && mount -t tmpfs -o size=64m,nr_inodes=500 runs {tmp_path}/runs"
    limits = 'ulimit -n 200 && exec taskset -c "$(taskset -cp $$ | sed "s/.*: *\\([0-9]*\\).*/\\1/")" "$@"'
    commands = [
        probe,
        [*probe, "--data", str(tmp_path / "nothing")],
        ["sh", "-c", limits, "sh", *probe],
        ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *probe],
    ]
    site = str(tmp_path / "site")
    plants = [
        {},
        {"PLANT": "clock", "PYTHONPATH": f"{site}:{Path(__file__).parents[2]}"},
        {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        {"PLANT": "locks"},
    ]
    return commands, plants


def in_four(commands: list[list[str]], plants: list[dict[str, str]], port: int, **more: str) -> Reports:
    meeting = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    environments = [
        {**meeting, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank + 1}", "OMP_NUM_THREADS": "1", **plant}
        for rank, plant in enumerate(plants)
    ]
    return run_tasks(commands, environments, seconds=90)


@pytest.fixture
def port() -> int:
    """Below the ephemeral range, of this process alone."""
    return 20000 + os.getpid() % 10000


def said(findings: list[Finding], *words: str) -> set[str]:
    """The hosts of the findings that say all the words."""
    return {host for finding in findings if all(word in finding.what for word in words) for host in finding.hosts}


@pytest.mark.slow
def test_faults_planted_in_real_processes_are_found(tmp_path: Path, port: int) -> None:
    """Fifteen, on three of four nodes that meet, share a folder and reduce for real."""
    if os.geteuid() != 0 or subprocess.run(("unshare", "--mount", "true")).returncode:
        pytest.skip("this machine lets a test have no mount namespace")
    reports = in_four(*planted_nodes(tmp_path), port)
    found = examine(reports, Requirements(gpus=None, workers=0))
    shown = "\n".join(map(str, [*found, reports.stderr]))
    assert said(found, "its clock is", "ahead of the first") == {"node2"}, shown
    assert said(found, "deepspeed is 0.1.0 here") == {"node2"}, shown
    assert said(found, "the data cannot be read here") == {"node2"}, shown
    assert said(found, "may open 200 files") == {"node3"}, shown
    assert said(found, "GPU is lost") == {"node3"}, shown
    assert said(found, "your quota leaves 0.1 GiB") == {"node3"}, shown
    assert said(found, "GPU 0 has 2 uncorrectable memory errors") == {"node3"}, shown
    assert said(found, "GPU 0 is slowed down by heat") == {"node3"}, shown
    assert said(found, "the GPU is NVIDIA H100") == {"node3"}, shown
    assert said(found, "NVIDIA driver is 550.54 here and none") == {"node3"}, shown
    assert said(found, "/dev/shm has") == {"node4"}, shown
    assert said(found, "does not see what node1, node2, node3 wrote") == {"node4"}, shown
    assert said(found, "does not see what node4 wrote") == {"node1", "node2", "node3"}, shown
    assert said(found, "its disk has", "GiB for checkpoints") >= {"node4"}, shown
    assert said(found, "more files") == {"node4"}, shown
    assert all("between" in one.rates and not one.error and not one.reduce_error for one in reports.shared.values()), (
        shown
    )
    assert not list((tmp_path / "runs").iterdir())  # nothing is left behind


@pytest.mark.slow
def test_locks_that_do_not_reach_other_nodes_are_found(tmp_path: Path, port: int) -> None:
    commands, plants = planted_nodes(tmp_path)
    locks = plants[3] | {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parents[2]}"}
    reports = in_four([commands[0]] * 2, [{}, locks], port)
    assert said(examine(reports, Requirements(workers=0)), "does not respect another node's file lock") == {"node2"}


@pytest.mark.slow
def test_nodes_that_do_not_come_are_named(tmp_path: Path, port: int) -> None:
    probe = [sys.executable, "-c", "import launch.health.shared as s; s.MEET_SECONDS = 2.0; "
             "from launch.health.probe import main; main()", "--folder", str(tmp_path / "runs")]  # fmt: skip
    dying = ["sh", "-c", "echo no such interpreter >&2; exit 1"]
    reports = in_four([probe, probe, dying], [{}, {"MASTER_ADDR": "no-such-node.invalid"}, {}], port)
    found = examine(reports, Requirements(workers=0))
    assert any("rank 2 does not start: no such interpreter" in finding.what for finding in found)
    assert said(found, "cannot reach no-such-node.invalid port") == {"node2"}
    assert said(found, "rank 1 has not reached the rendezvous") == {"node2"}


def test_the_first_node_says_where_to_meet_or_why_it_cannot() -> None:
    assert probe._meeting("lo", "7")["address"] == "127.0.0.1"
    said = probe._meeting("ib7", "7")
    assert said["address"] == "" and "has no interface ib7" in str(said["error"])


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    assert free_memory(tmp_path / "meminfo", tmp_path) == 8_000_000 * 1024
    for limit, left in (("max", 8_000_000 * 1024), ("3000000", 2_000_000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000000\n")
        assert free_memory(tmp_path / "meminfo", tmp_path) == left


def test_machine_without_a_driver_has_no_gpus_and_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == ([], "")


def words(tmp_path: Path, *more: str) -> list[str]:
    """Arguments: results under a folder of the test's, no loader workers."""
    places = (f"refiner.run.output={tmp_path}/runs", "refiner.data.workers=0")
    return [word for place in places for word in ("--set", place)] + list(more)


@pytest.mark.slow
def test_command_examines_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(words(tmp_path, "--gpus-per-node", "0")) == 0
    told = capfd.readouterr().out
    assert "2 tasks" in told and "all-reduce within a node (gloo)" in told and "images/s a core" in told
    assert doctor.main(words(tmp_path, "--gpus-per-node", "0", "--set", f"refiner.data.train={tmp_path}/no")) == 1
    assert f"the data cannot be read here: {tmp_path}/no: no such folder" in capfd.readouterr().out


def test_refusals(
    no_slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", no_slurm["PATH"])
    assert doctor.main(["--nodes", "2"]) == doctor.main(["--nodes", "0"]) == 2
    assert doctor.main(["--nodes", "2", "--gpus-per-node", "0"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(line.startswith("error: ") for line in told)
    assert "there is no Slurm here" in told[0] and "there is no Slurm here" in told[2]


@pytest.mark.slurm
def test_four_nodes_of_a_cluster_are_examined_and_their_faults_found(slurm: SlurmCluster, tmp_path: Path) -> None:
    """With a set-up line that spoils one node, a variable that spoils another, and a partition that is not there."""
    profile, quota = tmp_path / "mine.yaml", tmp_path / "bin/quota"
    quota.parent.mkdir()
    quota.write_text(QUOTA)
    quota.chmod(0o755)
    spoilt = ['[ "$SLURMD_NODENAME" != node3 ] || ulimit -n 100']
    path = {"node2": {"PATH": f"{quota.parent}:{slurm.env['PATH']}"}}
    keys = {"setup": spoilt, "node_environment": path, "master_addr": "lo", "gpus_per_node": 0}
    profile.write_text(json.dumps(keys))
    command = [sys.executable, str(Path(doctor.__file__)), *words(tmp_path, "--nodes", "4", "--cluster", str(profile))]
    done = subprocess.run(command, env=slurm.env, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert "4 nodes (node1, node2, node3, node4), 4 tasks" in done.stdout, done.stdout + done.stderr
    assert "error: node3: a process may open 100 files" in done.stdout and done.returncode == 1
    assert "all-reduce between nodes (gloo): " in done.stdout
    assert "error: node2: " in done.stdout and "your quota leaves 0.1 GiB" in done.stdout
    assert "ranks meet at 127.0.0.1, port 2" in done.stdout
    assert done.stdout.count("error: ") == 2, done.stdout
    for flag, says in (
        ("--partition", "Slurm knows no node of partition no"),
        ("--constraint", "Slurm gives no nodes: "),
    ):
        refused = subprocess.run([*command, flag, "no"], env=slurm.env, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {says}"), refused.stderr
        assert refused.stderr.count("\n") == 1
