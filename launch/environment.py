"""What a job finds on its nodes: an address and a port to meet at, variables, and a record of the environment."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from refiner_ds.errors import LaunchError
from refiner_ds.files import write_atomically

PORTS = range(20000, 30000)  # below the ephemeral range, where any outgoing connection may sit on a port
PORT_STRIDE = 617  # between the ports of a job's restarts
TOLD = ("NCCL_", "SLURM_JOB", "CUDA_", "OMP_", "LOADEDMODULES", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
SIOCGIFADDR = 0x8915


def free_port(job_id: str, restart_count: int) -> int:
    """A port of this machine for the ranks' rendezvous: another at every restart, and one that nobody listens at.

    Jobs of one number on two clusters, which may share a machine, begin at others.
    """
    job = f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job_id}"
    number = zlib.crc32(job.encode()) + restart_count * PORT_STRIDE
    candidates = [PORTS[(number + i) % len(PORTS)] for i in range(100)]
    return next((port for port in candidates if _is_free(port)), candidates[0])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("", port))
            return True
    return False


def master_address(how: str) -> str:
    """How other nodes reach this one: by "name", by "address", or by the address of an interface such as ib0.

    Raises:
        LaunchError: there is no such interface here, or it has no address.
    """
    if how == "name":
        return socket.gethostname()
    if how == "address":
        with suppress(OSError):
            return socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            with suppress(OSError):
                probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the interface of the default route
                return str(probe.getsockname()[0])
        raise LaunchError(
            f"{socket.gethostname()}: has no address; set master_addr to an interface (ip -brief address)"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", how[:15].encode()))
            return socket.inet_ntoa(found[20:24])
    here = ", ".join(name for _, name in socket.if_nameindex())
    raise LaunchError(f"master_addr: {socket.gethostname()} has no interface {how} with an IPv4 address; it has {here}")


def variables_on(host: str, by_pattern: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The further environment variables of a node (``node_environment``), whose name several patterns may match."""
    matching = [given for pattern, given in by_pattern.items() if fnmatch(host, pattern)]
    return {name: value for given in matching for name, value in given.items()}


def capture(file: Path, nodes: str) -> None:
    """Write down what this node runs with; a full disk cannot take it, and training does not need it."""
    record: dict[str, Any] = {
        "host": socket.gethostname(),
        "nodes": nodes,
        "platform": platform.platform(),
        "python": sys.version,
        "driver": _driver(),
        "packages": dict(sorted({(d.metadata["Name"] or "", d.version) for d in metadata.distributions()})),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TOLD)},
    }
    with suppress(OSError):
        write_atomically(file, json.dumps(record, indent=1) + "\n")


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
