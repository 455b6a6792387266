"""The tests' own Slurm is a real one, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .cluster import INSTALL, SlurmCluster, why_not
from .fixture import slurm, slurm_of_session  # noqa: F401  (fixtures: pytest finds them by name here)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slurm


def processes_naming(text: str) -> list[str]:
    """Command lines or environments of living processes that hold ``text``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if state not in "ZX" and text.encode() in words and process.name != str(os.getpid()):
            found.append(f"{process.name}: {words[:80]!r}")
    return found


def test_every_node_runs_its_task_under_its_own_name(slurm: SlurmCluster) -> None:  # noqa: F811
    done = slurm.client("srun", "-N4", "sh", "-c", "echo $SLURM_PROCID $(hostname) $(getent hosts $(hostname))")
    rows = sorted(line.split()[:3] for line in done.splitlines())
    assert rows == [[str(i), f"node{i + 1}", f"127.0.1.{i + 1}"] for i in range(4)]


def test_sacct_tells_submitit_how_a_job_ended(slurm: SlurmCluster) -> None:  # noqa: F811
    job = slurm.client("sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 3")
    assert slurm.wait(job, "FAILED") == "FAILED"
    assert f"{job}|FAILED|node" in slurm.client("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job)


def test_a_lost_node_takes_its_processes_along_and_comes_back(slurm: SlurmCluster) -> None:  # noqa: F811
    slurm.client("sbatch", "--nodelist=node3", "--output=/dev/null", "--wrap", "sleep 987654")
    until(lambda: processes_naming("sleep\x00987654"))
    slurm.node_down("node3")
    try:
        assert not processes_naming("sleep\x00987654")
    finally:
        slurm.node_up("node3")
    slurm.cancel_all()
    until(lambda: slurm.node_states()["node3"] == "idle", seconds=30)


def until(true: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)


@pytest.fixture
def busy_cluster_of_its_own() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a cluster with a running job, and the cluster's folder."""
    if why_not():
        pytest.skip(str(why_not()))
    script = (
        "import sys; from tests.slurm.cluster import SlurmCluster\n"
        "with SlurmCluster(nodes=2) as slurm:\n"
        "    job = slurm.client('sbatch', '--parsable', '-N2', '--output=/dev/null', '--wrap', 'srun sleep 1000')\n"
        "    slurm.wait(job, 'RUNNING')\n"
        "    print(slurm.folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        (sys.executable, "-c", script), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        yield holder, holder.stdout.readline().strip()
        holder.kill()


def test_nothing_is_left_when_a_cluster_goes_down(busy_cluster_of_its_own: tuple[subprocess.Popen[str], str]) -> None:
    holder, folder = busy_cluster_of_its_own
    assert len(processes_naming(folder)) > 6
    holder.communicate("", timeout=30)  # its stdin ends, and so does its with block
    assert holder.returncode == 0
    assert not Path(folder).exists()
    until(lambda: not processes_naming(folder))


def test_nothing_runs_on_when_the_tests_are_killed(busy_cluster_of_its_own: tuple[subprocess.Popen[str], str]) -> None:
    holder, folder = busy_cluster_of_its_own
    holder.kill()
    holder.wait(timeout=10)
    until(lambda: not processes_naming(folder))
    subprocess.run(("rm", "-r", folder), check=True)


def test_where_there_is_no_slurm_one_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.cluster._path", lambda: "/nowhere")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert INSTALL in str(why_not())
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in str(why_not())
