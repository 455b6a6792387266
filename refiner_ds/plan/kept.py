"""Micro-batches that were counted before, kept on disk: a run that differs in its learning rate is not counted again.

<cache>/micro_batches.json      what each came to, by a hash of what it follows from, the newest last
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from refiner_ds.attention.live_bytes import Operation
from refiner_ds.files import read_object, write_atomically
from refiner_ds.plan.trace import REMEMBERED, TRACED, Trace
from refiner_ds.versions import code_hash

__all__ = ["MICRO_BATCHES", "kept_on_disk"]

MICRO_BATCHES = "micro_batches.json"
LIBRARIES = ("torch", "timm", "triton", "deepspeed")


@contextmanager
def kept_on_disk(file: Path) -> Iterator[None]:
    """Inside, what this code has counted in another process is known; afterwards ``file`` knows what was counted here.

    A file that is missing or damaged knows nothing; one that cannot be written stays as it is.
    """
    code = _signature()
    for kept in (read_object(file) or {}).values():
        if (found := _read(kept)) is not None and found[0] == code:
            TRACED.setdefault(found[1], found[2])
    before = TRACED.keys() | set()
    yield
    if new := TRACED.keys() - before:
        added = {_name(code, key): [code, key, _to_json(TRACED[key])] for key in TRACED if key in new}
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            newest = list({**(read_object(file) or {}), **added}.items())[-REMEMBERED:]
            write_atomically(file, json.dumps(dict(newest)), writer=str(os.getpid()))


def _signature() -> str:
    """A hash of the code that counts and of what it counts with, wherever its files lie."""
    seen = hashlib.sha256(f"{platform.python_version()} {torch.backends.cpu.get_cpu_capability()}".encode())
    seen.update(code_hash().encode())
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            seen.update(f"{name} {metadata.version(name)}".encode())
    return seen.hexdigest()


def _name(code: str, key: str) -> str:
    return hashlib.sha256(f"{code} {key}".encode()).hexdigest()


def _to_json(trace: Trace) -> dict[str, Any]:
    operations = [[*astuple(one), times] for one, times in trace.operations.items()]
    return {"saved": trace.saved, "inputs": trace.inputs, "peak": trace.peak, "operations": operations}


def _read(kept: Any) -> tuple[str, str, Trace] | None:
    """The code's signature, the key and the counts of one entry; None where it is damaged."""
    with suppress(TypeError, ValueError, KeyError):
        code, key, counts = kept
        operations = {
            Operation(bool(back), int(flops), int(size)): int(n) for back, flops, size, n in counts["operations"]
        }
        saved = {str(kind): int(size) for kind, size in dict(counts["saved"]).items()}
        return str(code), str(key), Trace(saved, int(counts["inputs"]), int(counts["peak"]), operations)
    return None
