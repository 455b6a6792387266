"""A run file's memory on one process of some machines, by part."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from refiner_ds.attention import resolve_backend
from refiner_ds.config import RunFile
from refiner_ds.errors import ConfigError
from refiner_ds.plan.machines import Machines
from refiner_ds.plan.trace import Trace, trace
from refiner_ds.training.build import build_model
from refiner_ds.training.model_states import model_states

__all__ = ["Sized", "interpreter_bytes"]

GIB = 2**30
# Of what PyTorch allocates, for blocks that are free but of the wrong size. CUDA's context, NCCL's buffers and cuBLAS's
# workspace lie beside it. Both are assumptions, not measured.
FRAGMENTATION, RUNTIME = 0.05, 1.5 * GIB
# On a CPU, beside imports: oneDNN's code, allocator arenas, loader and TensorBoard, from runs of the quickstart.
CPU_RUNTIME = 0.15 * GIB


class Sized:
    """A run file's memory on one process of some machines."""

    def __init__(self, run: RunFile, machines: Machines, classes: int) -> None:
        self.run, self.machines, self.classes = run, machines, classes
        asked, on_gpu = run.keys.bf16.enabled, machines.gpu is not None
        self.bf16 = (on_gpu and machines.gpu.bf16_tflops is not None) if asked == "auto" else bool(asked)  # type: ignore[union-attr]
        asked_backend = run.refiner.model.attention
        given = os.environ.get("REFINER_ATTENTION") or (None if asked_backend == "auto" else asked_backend)
        try:
            self.backend = given or ("triton" if on_gpu else resolve_backend())
            if self.backend == "eager compiled":  # which saves and takes no more
                self.backend = "eager"
        except ValueError as refusal:
            raise ConfigError(str(refusal)) from None
        with torch.device("meta"):
            parameters = list(build_model(run, classes).parameters())
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.frozen = sum(p.numel() for p in parameters) - self.trained
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if machines.memory_gib is not None:
            ram = int(machines.memory_gib * GIB) * machines.per_node
        self.capacity = int(machines.gpu.memory_gib * GIB) if machines.gpu else ram // machines.per_node
        self._memory = self.capacity if machines.gpu else ram

    def traced(self, micro: int) -> Trace:
        """A micro-batch of so many images."""
        return trace(
            self.run, self.classes, micro, self.bf16, self.backend, self._memory, self.machines.gpu is not None
        )

    def parts(self, micro: int) -> dict[str, int]:
        """Bytes by part."""
        traced = self.traced(micro)
        states = model_states(
            self.run.keys.zero_optimization, self.trained, self.frozen, self.bf16, self.machines.processes
        )
        saved = sum(traced.saved.values())
        parts = {
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            "ema": states.ema,
            # A CPU's pages are taken when they are written, and of a bucket only as much as there are gradients is.
            "buckets": states.buckets if self.machines.gpu else min(states.buckets, states.gradients),
            "inputs": traced.inputs,
            "activations": saved,
            "recomputation_and_workspace": max(0, traced.peak - saved - traced.inputs),
        }
        if self.machines.gpu is not None:
            parts |= {"fragmentation": FRAGMENTATION * sum(parts.values()), "runtime": RUNTIME}
        else:
            parts["runtime"] = interpreter_bytes() + CPU_RUNTIME
        return {name: round(size) for name, size in parts.items()}


def interpreter_bytes() -> int:
    """Resident bytes of a process that has imported what training imports, and done nothing: this one's."""
    import refiner_ds.training.session  # noqa: F401  what is measured

    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
