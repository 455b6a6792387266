"""Where the ranks of a plain batch job meet: the scripts themselves, with a stand-in for Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import ROOT

SRUN = """\
#!/bin/bash
echo "$MASTER_PORT" >> ports
[ "$(wc -l < ports)" -le "${TAKEN:-0}" ] && { "$PYTHON" listen.py "$MASTER_PORT"; exit 1; }
exit "${CODE:-0}"
"""
# Takes a port as another job would, a moment after the script has looked; leaves its number for the test to end it.
LISTEN = """\
import os, socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if os.fork():
    os._exit(0)
open("listeners", "a").write(f"{os.getpid()}\\n")
os.close(1), os.close(2)
time.sleep(60)
"""


def run(folder: Path, launcher: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """The script in ``folder``; its end, and the ports its launches were told, one a launch."""
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "listen.py").write_text(LISTEN)
    known = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "one", "SLURM_SUBMIT_DIR": "/clone", "SLURM_JOB_NODELIST": "n"}
    environment = {**os.environ, **known, "PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"PYTHON": sys.executable, **variables}
    (folder / "ports").unlink(missing_ok=True)
    try:
        done = subprocess.run(
            ("bash", str(ROOT / f"launch/scripts/{launcher}.sbatch")),
            cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        for number in (folder / "listeners").read_text().split() if (folder / "listeners").exists() else ():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
    return done, [int(port) for port in (folder / "ports").read_text().split()]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_another_port_is_tried_where_another_job_took_the_first(launcher: str, tmp_path: Path) -> None:
    done, ports = run(tmp_path, launcher, TAKEN="1")
    assert done.returncode == 0, done.stderr
    assert len(set(ports)) == 2 and f"port {ports[0]} was taken; another is tried" in done.stderr
    done, ports = run(tmp_path, launcher, TAKEN="9")
    assert done.returncode == 1 and len(set(ports)) == 3
    done, ports = run(tmp_path, launcher, CODE="3")  # it failed, and not for want of a port
    assert (done.returncode, len(ports), done.stderr) == (3, 1, "")
    assert not list(tmp_path.glob("hostfile*"))


def test_a_port_that_is_taken_already_is_not_tried_and_clusters_begin_at_others(tmp_path: Path) -> None:
    ports = {}
    for cluster, restarts in (("one", "0"), ("two", "0"), ("one", "1")):
        _, (ports[cluster, restarts],) = run(
            tmp_path, "torchrun", SLURM_CLUSTER_NAME=cluster, SLURM_RESTART_COUNT=restarts
        )
    assert len(set(ports.values())) == 3 and all(20000 <= port < 30000 for port in ports.values())
    _, again = run(tmp_path, "torchrun")
    assert again == [ports["one", "0"]]
    holder = subprocess.Popen((sys.executable, "listen.py", str(again[0])), cwd=tmp_path)
    assert holder.wait(30) == 0  # it listens, in a process of its own that run() ends
    _, (port,) = run(tmp_path, "torchrun")
    assert port != again[0]
