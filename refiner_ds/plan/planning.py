"""What a run will take, before it is started: memory a GPU by part, step time, communication, checkpoints, cost.

memory    states (training/model_states.py) + the peak of one traced micro-batch (trace.py) + a margin
step      every operation at the data sheet's rates, the slower of arithmetic and memory: a lower bound
network   what each process sends by ZeRO stage, over the slower of the node's link and the network
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.config import RunFile
from refiner_ds.errors import ConfigError
from refiner_ds.gpus import Gpu
from refiner_ds.plan.trace import Trace, trace
from refiner_ds.training.model_states import model_states

__all__ = ["Machines", "make_plan"]

GIB = 2**30
# Of what PyTorch allocates, for blocks that are free but of the wrong size. CUDA's context, NCCL's buffers and cuBLAS's
# workspace lie beside it. Both are assumptions, not measured.
FRAGMENTATION, RUNTIME = 0.05, 1.5 * GIB
# On a CPU, beside imports: oneDNN's code, allocator arenas, loader and TensorBoard, from runs of the quickstart.
CPU_RUNTIME = 0.15 * GIB


@dataclass(frozen=True)
class Machines:
    """What a run is to train on.

    Attributes:
        gpu: None for CPU processes.
        nodes, per_node: how many, and processes on each.
        network: of a node, one direction, GB/s.
        disk: to the run folder, GB/s.
        price: of a GPU-hour; None: not asked.
        step_seconds: measured, in place of the lower bound.
        memory_gib: of a process on CPUs; None: its share of this machine's.
    """

    gpu: Gpu | None
    nodes: int = 1
    per_node: int = 1
    network: float = 50.0
    disk: float = 1.0
    price: float | None = None
    step_seconds: float | None = None
    memory_gib: float | None = None

    @property
    def processes(self) -> int:
        """In all."""
        return self.nodes * self.per_node


def make_plan(
    run: RunFile, machines: Machines, classes: int, images: int | None, largest: bool = True
) -> dict[str, Any]:
    """The plan as one JSON object; docs/planning.md describes its fields. Memory in bytes, time in seconds.

    Args:
        classes, images: of the training set; images None: unknown.
        largest: find the largest micro-batch too, for which another one is counted.
    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    batch = run.batch(machines.processes)
    sized = _Sized(run, machines, classes)
    parts = sized.parts(batch.micro_batch)
    needed, capacity = sum(parts.values()), sized.capacity
    micro = batch.micro_batch
    plan: dict[str, Any] = {
        "config": str(run.path),
        "gpu": machines.gpu.name if machines.gpu else "cpu",
        "processes": machines.processes,
        "precision": "bf16" if sized.bf16 else "fp32",
        "attention": sized.backend,
        "parameters": sized.trained + sized.frozen,
        "batch": {"global": batch.global_batch, "micro": micro, "accumulation": batch.accumulation},
        "memory": {
            "parts": parts,
            "activations": sized.traced(micro).saved,
            "needed": needed,
            "capacity": capacity,
            "fits": needed <= capacity,
            **(_largest(sized, micro, batch.global_batch // machines.processes) if largest else {}),
            "remedies": [] if needed <= capacity else _remedies(run, machines, classes, needed, micro),
        },
    }
    plan["step"] = _step(run, machines, sized, batch.accumulation, micro)
    checkpoint = 16 * (sized.trained + sized.frozen) + (1 << 20)
    plan["checkpoint"] = {"bytes": checkpoint, "seconds": checkpoint / (machines.disk * 1e9)}
    plan["cost"] = _cost(run, machines, batch, images, plan["step"]["seconds"])
    return plan


def _largest(sized: _Sized, micro: int, share: int) -> dict[str, int]:
    """The largest micro-batch that fits, by the line through two, and the largest that divides a process's share."""
    few = 2 if micro > 2 else 4
    needed = sum(sized.parts(micro).values())
    slope = (needed - sum(sized.parts(few).values())) / (micro - few)
    largest = max(0, int(micro + (sized.capacity - needed) // slope)) if slope > 0 else micro
    fitting = [size for size in range(1, share + 1) if share % size == 0 and size <= largest]
    return {"largest_micro_batch": largest, "largest_dividing_micro_batch": max(fitting, default=0)}


class _Sized:
    """A run file's memory on one process of some machines."""

    def __init__(self, run: RunFile, machines: Machines, classes: int) -> None:
        import torch

        from refiner_ds.attention import resolve_backend
        from refiner_ds.training.build import build_model

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


def _remedies(run: RunFile, machines: Machines, classes: int, needed: int, micro: int) -> list[dict[str, Any]]:
    """What to set, and bytes that it saves, the largest first."""
    keys, zero = run.refiner.model, run.keys.zero_optimization
    tries = []
    if micro > 1:
        tries.append(f"train_micro_batch_size_per_gpu={micro // 2}")
    tries += [f"refiner.model.checkpointing={unit}" for unit in ("pair", "refiner") if unit != keys.checkpointing]
    if keys.save_for_backward != "map":
        tries.append("refiner.model.save_for_backward=map")
    if zero.stage < 2:
        tries.append("zero_optimization.stage=2")
    if zero.stage and zero.reduce_bucket_size is None:
        tries.append("zero_optimization.reduce_bucket_size=50000000")
    found = []
    for setting in tries:
        changed = _with(run, setting)
        size = micro // 2 if setting.startswith("train_micro") else micro
        saved = needed - sum(_Sized(changed, machines, classes).parts(size).values())
        if saved > 0:
            found.append(
                {"set": setting, "saves": saved, "fits": needed - saved <= _Sized(run, machines, classes).capacity}
            )
    return sorted(found, key=lambda remedy: -remedy["saves"])


def _with(run: RunFile, setting: str) -> RunFile:
    import json

    key, _, value = setting.partition("=")
    *path, last = key.split(".")
    resolved = run.resolved()
    at: dict[str, Any] = resolved
    for name in path:
        at = at.setdefault(name, {})
    at[last] = json.loads(value) if value[0].isdigit() else value
    keys = type(run.keys).model_validate(resolved)
    return RunFile(run.path, keys)


def _step(run: RunFile, machines: Machines, sized: _Sized, accumulation: int, micro: int) -> dict[str, Any]:
    traced = sized.traced(micro)
    counted = traced.operations.items()
    flops = sum(one.flops * times for one, times in counted)
    found: dict[str, Any] = {
        "flops": accumulation * flops,
        "bytes": accumulation * sum(one.bytes * times for one, times in counted),
    }
    if (gpu := machines.gpu) is None:
        return {**found, "seconds": machines.step_seconds, "measured": machines.step_seconds is not None}
    peak = 1e12 * (gpu.bf16_tflops if sized.bf16 and gpu.bf16_tflops else gpu.fp32_tflops)
    rate = 1e9 * gpu.bandwidth

    def bound(backward: bool) -> float:
        ops = ((one, times) for one, times in counted if one.backward == backward)
        return accumulation * sum(times * max(one.flops / peak, one.bytes / rate) for one, times in ops)

    owned = sized.trained / (machines.processes if run.keys.zero_optimization.stage else 1)
    sent = _sent(run, sized, machines.processes, accumulation)
    slowest = min(gpu.link, machines.network) if machines.nodes > 1 else gpu.link
    parts = {
        "forward": bound(False),
        "backward": bound(True),
        "optimizer": owned * 40 / rate,  # reads gradient, master, moments, EMA; writes the last four
        "communication": sent / (1e9 * slowest),
    }
    seconds = machines.step_seconds or sum(parts.values())
    return {**found, "parts": parts, "sent": sent, "seconds": seconds, "measured": machines.step_seconds is not None}


def _sent(run: RunFile, sized: _Sized, processes: int, accumulation: int) -> float:
    """Bytes that each process sends in a step, by rings.

    Stages 0 and 1: an all-reduce, or reduce-scatter and all-gather, once; 2: a reduce-scatter every micro-batch and an
    all-gather; 3: two all-gathers and a reduce-scatter every micro-batch.
    """
    stage = run.keys.zero_optimization.stage
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]
    return passes * (2 if sized.bf16 else 4) * sized.trained * (processes - 1) / processes


def _cost(run: RunFile, machines: Machines, batch: Any, images: int | None, seconds: float | None) -> dict[str, Any]:
    from refiner_ds.training.schedule import Schedule

    if images is None:
        return {"steps": None, "hours": None, "gpu_hours": None, "money": None}
    steps = Schedule(run.refiner.recipe, batch, images).total_steps
    hours = None if seconds is None else steps * seconds / 3600
    gpu_hours = None if hours is None else hours * machines.processes
    money = None if gpu_hours is None or machines.price is None else gpu_hours * machines.price
    return {"steps": steps, "hours": hours, "gpu_hours": gpu_hours, "money": money}
