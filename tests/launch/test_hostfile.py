"""``deepspeed --hostfile`` over ssh: two names of this machine, an sshd of the test's own, and pdsh, for real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refiner_ds.run_folder import RunFolder, read_state

from .conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(600)]

INSTALL = "apt-get install -y openssh-server pdsh"
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin"
SEPARATION = Path("/run/sshd")  # sshd wants this folder, which the system's own service makes

SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv OMP_NUM_THREADS=1
"""
# Where a name leads, and with which key, is for a user's own ~/.ssh/config to say; this one is the test's.
CLIENT = """\
Host node1 node2
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine from which ``ssh node1`` and ``ssh node2`` lead to this one."""
    missing = [program for program in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(program, path=SBIN) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; install with {INSTALL}")
    folder = tmp_path / "ssh"
    folder.mkdir()
    for name in ("key", "host_key"):
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)), check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    (folder / "config").write_text(CLIENT.format(port=port, folder=folder))
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    made = os.geteuid() == 0 and not SEPARATION.exists()
    if made:
        SEPARATION.mkdir()
    server = subprocess.Popen((str(shutil.which("sshd", path=SBIN)), "-D", "-e", "-f", f"{folder}/sshd_config"))
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    try:
        end = time.monotonic() + 60
        while subprocess.run(("ssh", "node2", "true"), env=environment, capture_output=True).returncode:
            assert time.monotonic() < end and server.poll() is None
            time.sleep(0.2)
        yield environment
    finally:
        server.terminate()
        server.wait(timeout=30)
        if made:
            SEPARATION.rmdir()


def test_ranks_of_two_hosts_that_ssh_reaches_train_together(ssh: dict[str, str], tmp_path: Path, cache: Path) -> None:
    run = {
        "extends": str(ROOT / "ds_configs/quickstart.json"),
        "train_batch_size": 120,
        "refiner": {
            "model": {"depth": 2, "attention": "eager"},
            "recipe": {"epochs": 0.5, "warmup_epochs": 0.1, "cooldown_epochs": 0},
            "run": {"output": str(tmp_path), "name": "mine", "eval_epochs": 4, "picture_epochs": None},
            "data": {"cache": str(cache), "workers": 0},
        },
    }
    (tmp_path / "mine.json").write_text(json.dumps(run))
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    script, launcher = str(ROOT / "refiner_ds/train.py"), str(Path(sys.executable).parent / "deepspeed")
    done = subprocess.run(
        (launcher, "--hostfile", "hostfile", script, "--config", "mine.json"),
        cwd=tmp_path, env=ssh, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = RunFolder(tmp_path / "mine")
    (life,) = (json.loads(line) for line in folder.history.read_text().splitlines())
    assert len(life["processes"]) == 2
    checkpoint = folder.latest_checkpoint()
    assert checkpoint is not None and read_state(checkpoint).world_size == 2
    assert folder.reached() is not None
    assert {"node1: ", "node2: "} <= {line[:7] for line in (done.stdout + done.stderr).splitlines()}  # as pdsh marks
