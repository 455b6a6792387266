"""The time of an optimizer step: as given, as measured by a run on such machines, or at least, at data-sheet rates.

A step that was measured on fewer or more GPUs of the same kind, with the same micro-batch, is brought to those planned
for: what its network and optimizer take at data-sheet rates is taken off, and what they take here is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from refiner_ds.config import BatchSplit, RunFile
from refiner_ds.gpus import Gpu, recognise
from refiner_ds.plan.machines import Machines
from refiner_ds.plan.sized import Sized
from refiner_ds.step_times import StepTime
from refiner_ds.training.machine import device_name
from refiner_ds.versions import code_hash

__all__ = ["plan_step"]


def plan_step(
    run: RunFile, machines: Machines, sized: Sized, batch: BatchSplit, classes: int, measured: Sequence[StepTime]
) -> dict[str, Any]:
    """Work and seconds of a step; docs/planning.md describes the fields.

    Args:
        measured: steps of runs with this run file's model and settings, the newest first.
    """
    counted = sized.traced(batch.micro_batch).operations.items()
    found: dict[str, Any] = {
        "flops": batch.accumulation * sum(one.flops * times for one, times in counted),
        "bytes": batch.accumulation * sum(one.bytes * times for one, times in counted),
    }
    alike = [one for one in measured if one.micro_batch == batch.micro_batch and one.classes == classes]
    same = _nearest_first([one for one in alike if _is_same_device(one.device, machines.gpu)], machines, batch)
    nearest = next(iter(same), None)
    exact = nearest is not None and _is_split_alike(nearest, machines, batch)
    if machines.gpu is None:  # whose processes share cores: no other number of them tells anything
        nearest = nearest if exact else None
        return {**found, **_seconds(machines.step_seconds, nearest, nearest.seconds if nearest else None, True, None)}
    rates = _Rates(run, machines, sized)
    parts = rates.parts(machines.nodes, machines.processes, batch.accumulation, counted)
    scaled = None if nearest is None else nearest.seconds
    if nearest is not None and not exact:
        there = rates.around(nearest.nodes, nearest.processes, nearest.accumulation)
        each = max(0.0, nearest.seconds - sum(there.values())) / nearest.accumulation
        here = rates.around(machines.nodes, machines.processes, batch.accumulation)
        scaled = batch.accumulation * each + sum(here.values())
    return {
        **found,
        "parts": parts,
        "sent": rates.sent(machines.processes, batch.accumulation),
        **_seconds(machines.step_seconds, nearest, scaled, exact, sum(parts.values())),
    }


def _seconds(
    given: float | None, measured: StepTime | None, scaled: float | None, exact: bool, bound: float | None
) -> dict[str, Any]:
    """Seconds, what they rest on, and the measurement where they rest on one."""
    if given is not None:
        return {"seconds": given, "basis": "given", "measured": None}
    if measured is None:
        return {"seconds": bound, "basis": None if bound is None else "data sheet", "measured": None}
    described = asdict(measured)
    described |= {"same_code": described.pop("code") == code_hash(), "exact": exact}
    return {"seconds": scaled, "basis": "measured", "measured": described}


def _is_same_device(device: str, gpu: Gpu | None) -> bool:
    """Whether a measurement's device is what is planned for: the GPU of this name, or this machine's CPU."""
    if gpu is None:
        return device == device_name(torch.device("cpu"))
    found = recognise(device)
    return found is not None and found.name == gpu.name


def _is_split_alike(one: StepTime, machines: Machines, batch: BatchSplit) -> bool:
    """Whether a measurement is of as many nodes and processes, and of the batch split alike."""
    split = (one.nodes, one.processes, one.accumulation)
    return split == (machines.nodes, machines.processes, batch.accumulation)


def _nearest_first(measured: Sequence[StepTime], machines: Machines, batch: BatchSplit) -> list[StepTime]:
    """By how many times as many nodes, processes and micro-batches there are; of those alike the newest first."""

    def distance(one: StepTime) -> tuple[float, float, float]:
        pairs = (
            (one.nodes, machines.nodes),
            (one.processes, machines.processes),
            (one.accumulation, batch.accumulation),
        )
        nodes, processes, accumulation = (max(pair) / min(pair) for pair in pairs)
        return nodes, processes, accumulation

    return sorted(measured, key=distance)


class _Rates:
    """Seconds of a step's parts at a GPU's data-sheet rates."""

    def __init__(self, run: RunFile, machines: Machines, sized: Sized) -> None:
        assert machines.gpu is not None
        self._gpu, self._network = machines.gpu, machines.network
        self._stage, self._sized = run.keys.zero_optimization.stage, sized

    def parts(self, nodes: int, processes: int, accumulation: int, counted: Any) -> dict[str, float]:
        """All of them: every operation, the slower of arithmetic and memory, and what is around them."""
        gpu = self._gpu
        peak = 1e12 * (gpu.bf16_tflops if self._sized.bf16 and gpu.bf16_tflops else gpu.fp32_tflops)
        rate = 1e9 * gpu.bandwidth

        def bound(backward: bool) -> float:
            ops = ((one, times) for one, times in counted if one.backward == backward)
            return accumulation * sum(times * max(one.flops / peak, one.bytes / rate) for one, times in ops)

        return {
            "forward": bound(False),
            "backward": bound(True),
            **self.around(nodes, processes, accumulation),
        }

    def around(self, nodes: int, processes: int, accumulation: int) -> dict[str, float]:
        """Those that depend on the number of processes."""
        gpu = self._gpu
        owned = self._sized.trained / (processes if self._stage else 1)
        slowest = min(gpu.link, self._network) if nodes > 1 else gpu.link
        return {
            # Reads gradient, master, moments, EMA; writes the last four.
            "optimizer": owned * 40 / (1e9 * gpu.bandwidth),
            "communication": self.sent(processes, accumulation) / (1e9 * slowest),
        }

    def sent(self, processes: int, accumulation: int) -> float:
        """Bytes that each process sends in a step, by rings.

        Stages 0 and 1: an all-reduce, or reduce-scatter and all-gather, once; 2: a reduce-scatter every micro-batch and
        an all-gather; 3: two all-gathers and a reduce-scatter every micro-batch.
        """
        passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[self._stage]
        return passes * (2 if self._sized.bf16 else 4) * self._sized.trained * (processes - 1) / processes
