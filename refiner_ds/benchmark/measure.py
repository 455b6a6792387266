"""Time and memory of a step, on CPU and on GPU, so that several steps can be compared within one run.

best_seconds  interleaved rounds; CPU time of this process, or elapsed time between two CUDA events
saved_bytes   what autograd saves for backward, storage by storage
peak_bytes    highest use above where the step began: CUDA's allocator, or the process's resident set
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from refiner_ds.attention.timing import seconds_of

__all__ = ["best_seconds", "saved_bytes", "peak_bytes"]

Step = Callable[[], object]


def best_seconds(steps: Sequence[Step], rounds: int, device: torch.device) -> list[float]:
    """The shortest of ``rounds`` for each step, after one round to warm up.

    Rounds are interleaved, so that a busy moment of the machine falls on all alike, and CPU time is counted rather
    than elapsed time, so that other processes do not count. With one torch thread the two agree on an idle machine.
    """
    for step in steps:
        step()
    best = [float("inf")] * len(steps)
    for _ in range(rounds):
        for index, step in enumerate(steps):
            best[index] = min(best[index], seconds_of(step, device))
    return best


def saved_bytes(forward: Step, model: nn.Module) -> int:
    """Bytes autograd saves for the backward of ``forward``, each storage once, without the model's own weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())  # held, or the address could be given to the next tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most memory in use during ``step`` beyond what was in use before.

    On CPU it is the resident set of the whole process, so call it in a process that has done nothing large before:
    freed memory that the allocator holds would hide what the step needs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark, see proc(5)
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
