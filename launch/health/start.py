"""The short form of an examination: what keeps a node from training, looked at when a job starts on it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .limits import LEAST_DISK, LEAST_SHARED_MEMORY
from .node import MIB, free_bytes, nvidia_gpus


def node_faults(run_folder: Path, gpus: int, workers: bool) -> list[str]:
    """What keeps this node from training, a sentence each; a fraction of a second.

    Args:
        gpus: GPUs that a process here must see.
        workers: whether loader workers hand batches over in shared memory.
    """
    faults = _gpu_faults(gpus) if gpus else []
    shared = free_bytes(Path("/dev/shm"))
    if workers and 0 <= shared < LEAST_SHARED_MEMORY:
        faults.append(f"/dev/shm has {shared // MIB} MB free, too little for the loader workers")
    for place in (run_folder, Path(tempfile.gettempdir())):
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            faults.append(f"{place} cannot be written: {error.strerror}")
            continue
        free = free_bytes(place)
        if place != run_folder and 0 <= free < LEAST_DISK:
            faults.append(f"{place} has {free // MIB} MB free")
    return faults


def _gpu_faults(gpus: int) -> list[str]:
    found, error = nvidia_gpus()
    if error:
        return [error]
    if not found:
        return []  # another make of GPU; torch will say
    faults = [f"GPU {gpu.index} has had {gpu.ecc_errors} uncorrected ECC errors" for gpu in found if gpu.ecc_errors]
    return faults + ([f"{len(found)} of {gpus} GPUs answer"] if len(found) < gpus else [])
