"""What one task measures of its machine: cores, memory, disks, GPUs, limits, versions. Nothing here needs torch."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from refiner_ds.memory import free_memory

GIB, MIB = 2**30, 2**20
PACKAGES = ("torch", "deepspeed", "timm", "numpy", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
SMI_FIELDS = (
    "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,"
    "clocks_throttle_reasons.active,mig.mode.current"
)
SLOWED = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}  # bits of nvidia-smi's reasons
WRITE_MIB = 32
DECODE_SECONDS = 0.5
JPEG_SIDE = (375, 500)  # rows and columns of a usual ImageNet photograph


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi shows it; memory in MiB."""

    index: int
    name: str
    memory: int
    used: int
    ecc_errors: int
    slowed_by: str
    mig: bool


@dataclass(frozen=True)
class Folder:
    """A folder as this machine sees it.

    Attributes:
        error: why it cannot be written, or "".
        free: bytes; -1 where unknown, as are the others.
        free_inodes: files that can still be made.
        quota_left: bytes that this user's quota leaves, where there is one.
        write_rate: bytes/s, synchronised.
    """

    path: str
    error: str = ""
    free: int = -1
    free_inodes: int = -1
    quota_left: int = -1
    write_rate: float = -1.0


@dataclass(frozen=True)
class Node:
    """What one task has measured; memory in bytes.

    Attributes:
        cores: their numbers, of those that this task may use.
        decode_rate: images/s that one core decodes.
        gpus: that nvidia-smi shows on the machine; gpu_error says why it shows none.
        data_error: why the data cannot be read here, or "".
    """

    rank: int
    host: str
    cores: list[int] = field(default_factory=list)
    memory: int = -1
    shared_memory: int = -1
    open_files: int = -1
    decode_rate: float = -1.0
    folder: Folder = Folder("")
    gpus: list[Gpu] = field(default_factory=list)
    gpu_error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    data_error: str = ""


def host_name() -> str:
    """The node's name as Slurm knows it, or the machine's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def measure(rank: int, folder: Path, data: str) -> Node:
    """Measure this machine.

    Args:
        folder: where run folders are to lie; made if it is not there.
        data: a set that must be readable, or "".
    """
    gpus, gpu_error = nvidia_gpus()
    return Node(
        rank=rank,
        host=host_name(),
        cores=sorted(os.sched_getaffinity(0)),
        memory=free_memory(),
        shared_memory=free_bytes(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        decode_rate=decode_rate(),
        folder=examine_folder(folder, rank),
        gpus=gpus,
        gpu_error=gpu_error,
        versions=versions(),
        data_error=data_error(data),
    )


def free_bytes(path: Path) -> int:
    """Bytes that are free there; -1 where that cannot be told."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def decode_rate() -> float:
    """Images/s of usual size that one core decodes."""
    import numpy as np
    import simplejpeg

    rows, columns = np.mgrid[: JPEG_SIDE[0], : JPEG_SIDE[1]]
    smooth = np.stack([rows * 0.5 + columns * 0.2, rows * 0.1 + columns * 0.4, rows + columns], -1)
    noise = np.random.default_rng(0).normal(0, 12, smooth.shape)
    photograph = simplejpeg.encode_jpeg((smooth + noise).clip(0, 255).astype(np.uint8), 90)
    began = time.process_time()
    images = 0
    while time.process_time() - began < DECODE_SECONDS:
        simplejpeg.decode_jpeg(photograph)
        images += 1
    return images / (time.process_time() - began)


def examine_folder(folder: Path, rank: int) -> Folder:
    """Write a file into a folder and remove it."""
    probe = folder / f".doctor-{host_name()}-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with probe.open("wb") as file:
            for _ in range(WRITE_MIB):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
        rate = WRITE_MIB * MIB / (time.monotonic() - began)
        status = os.statvfs(folder)
    except OSError as error:
        return Folder(str(folder), error=error.strerror or str(error))
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:
            pass
    inodes = status.f_favail if status.f_files else -1  # some file systems do not count them
    return Folder(str(folder), "", status.f_bavail * status.f_frsize, inodes, _quota_left(folder), rate)


def _quota_left(folder: Path) -> int:
    """Bytes that the user's quota leaves on the folder's file system; -1 without one."""
    answers = _output("quota", "-w", "-f", str(folder)) + _output("lfs", "quota", "-q", str(folder))  # NFS; Lustre
    for line in answers.splitlines():
        words = line.split()
        numbers = [word.rstrip("*") for word in words if word.rstrip("*").isdigit()]
        if len(numbers) >= 3 and int(numbers[2]):  # used, soft limit and hard limit, in KiB
            return (int(numbers[2]) - int(numbers[0])) * 1024
    return -1


def nvidia_gpus() -> tuple[list[Gpu], str]:
    """GPUs that nvidia-smi shows; or why it shows none, "" where the machine has no driver."""
    try:
        command = ("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits")
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return [], ""
    except (OSError, subprocess.TimeoutExpired):
        return [], "nvidia-smi does not answer"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    gpus = [_gpu(row) for row in rows if len(row) == 8 and row[0].isdigit()]
    if answer.returncode or len(gpus) < len(rows):
        said = (answer.stderr.strip() or answer.stdout.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        return gpus, f"nvidia-smi says: {said}"
    return gpus, ""


def _gpu(row: list[str]) -> Gpu:
    index, name, _, memory, used, ecc, reasons, mig = row
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    slowed = sorted({reason for bit, reason in SLOWED.items() if bits & bit})
    return Gpu(int(index), name, _number(memory), _number(used), _number(ecc), ", ".join(slowed), mig == "Enabled")


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" of what a GPU does not have


def versions() -> dict[str, str]:
    """What must be alike on all nodes."""
    import refiner_ds

    found = {"python": sys.version.split()[0], "interpreter": sys.executable}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["refiner_ds"] = str(Path(refiner_ds.__file__).parent)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    if driver:
        found["NVIDIA driver"] = driver[0]
    return found


def data_error(data: str) -> str:
    """Why a set cannot be opened here, or ""."""
    if not data:
        return ""
    from refiner_ds.data.index import ShardIndex
    from refiner_ds.errors import RefinerError

    try:
        ShardIndex.load(data)
    except (RefinerError, OSError) as error:
        return str(error)
    return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def read_node(stored: dict[str, Any]) -> Node:
    """A Node from what `dataclasses.asdict` made of it."""
    folder, gpus = Folder(**stored.pop("folder")), [Gpu(**gpu) for gpu in stored.pop("gpus")]
    return Node(**stored, folder=folder, gpus=gpus)
