"""What NCCL was last asked to do, from torch's Flight Recorder: a hang's other half, beside the Python stacks."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
import torch.distributed as dist

ENTRIES = "2000"  # collectives remembered; some hundred bytes each


def enable() -> None:
    """Have NCCL's collectives remembered; to be called before the process group opens."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the newer name, the older one
        os.environ.setdefault(name, ENTRIES)


def last_collective() -> str | None:
    """The newest collective of this process in words; None where nothing is remembered, as with gloo."""
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return None
    dump = torch._C._distributed_c10d._dump_nccl_trace  # type: ignore[attr-defined]  # builds with NCCL have it
    return describe(pickle.loads(dump(includeCollectives=True, includeStackTraces=False)))


def describe(trace: dict[str, Any]) -> str | None:
    """The newest entry of a Flight Recorder's dump in words."""
    entries = trace.get("entries")
    if not entries:
        return None
    last = max(entries, key=lambda entry: entry.get("record_id", 0))
    shapes = ", ".join(str(list(shape)) for shape in last.get("input_sizes", []))
    name, number, state = (last.get(key, "?") for key in ("profiling_name", "collective_seq_id", "state"))
    return f"{name} number {number}, {state}, of {shapes}"
