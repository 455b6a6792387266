"""What a run will take, before it is started: memory a GPU by part, step time, communication, checkpoints, cost.

memory    sized.py: states (training/model_states.py) + the peak of one traced micro-batch (trace.py) + a margin
step      step.py: as a run has measured it; else every operation at the data sheet's rates, a lower bound
network   what each process sends by ZeRO stage, over the slower of the node's link and the network
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from refiner_ds.config import BatchSplit, RunFile
from refiner_ds.plan.machines import Machines
from refiner_ds.plan.sized import Sized
from refiner_ds.plan.step import plan_step
from refiner_ds.step_times import StepTime
from refiner_ds.training.schedule import Schedule

__all__ = ["make_plan"]


def make_plan(
    run: RunFile,
    machines: Machines,
    classes: int,
    images: int | None,
    largest: bool = True,
    measured: Sequence[StepTime] = (),
) -> dict[str, Any]:
    """The plan as one JSON object; docs/planning.md describes its fields. Memory in bytes, time in seconds.

    Args:
        classes, images: of the training set; images None: unknown.
        largest: find the largest micro-batch too, for which another one is counted.
        measured: steps of runs like this one, the newest first.
    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    batch = run.batch(machines.processes)
    sized = Sized(run, machines, classes)
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
    plan["step"] = plan_step(run, machines, sized, batch, classes, measured)
    checkpoint = 16 * (sized.trained + sized.frozen) + (1 << 20)
    plan["checkpoint"] = {"bytes": checkpoint, "seconds": checkpoint / (machines.disk * 1e9)}
    plan["cost"] = _cost(run, machines, batch, images, plan["step"]["seconds"])
    return plan


def _largest(sized: Sized, micro: int, share: int) -> dict[str, int]:
    """The largest micro-batch that fits, by the line through two, and the largest that divides a process's share."""
    few = 2 if micro > 2 else 4
    needed = sum(sized.parts(micro).values())
    slope = (needed - sum(sized.parts(few).values())) / (micro - few)
    largest = max(0, int(micro + (sized.capacity - needed) // slope)) if slope > 0 else micro
    fitting = [size for size in range(1, share + 1) if share % size == 0 and size <= largest]
    return {"largest_micro_batch": largest, "largest_dividing_micro_batch": max(fitting, default=0)}


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
        saved = needed - sum(Sized(changed, machines, classes).parts(size).values())
        if saved > 0:
            found.append(
                {"set": setting, "saves": saved, "fits": needed - saved <= Sized(run, machines, classes).capacity}
            )
    return sorted(found, key=lambda remedy: -remedy["saves"])


def _with(run: RunFile, setting: str) -> RunFile:
    key, _, value = setting.partition("=")
    *path, last = key.split(".")
    resolved = run.resolved()
    at: dict[str, Any] = resolved
    for name in path:
        at = at.setdefault(name, {})
    at[last] = json.loads(value) if value[0].isdigit() else value
    keys = type(run.keys).model_validate(resolved)
    return RunFile(run.path, keys)


def _cost(
    run: RunFile, machines: Machines, batch: BatchSplit, images: int | None, seconds: float | None
) -> dict[str, Any]:
    if images is None:
        return {"steps": None, "hours": None, "gpu_hours": None, "money": None}
    steps = Schedule(run.refiner.recipe, batch, images).total_steps
    hours = None if seconds is None else steps * seconds / 3600
    gpu_hours = None if hours is None else hours * machines.processes
    money = None if gpu_hours is None or machines.price is None else gpu_hours * machines.price
    return {"steps": steps, "hours": hours, "gpu_hours": gpu_hours, "money": money}
