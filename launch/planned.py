"""What the planner says of a run before it is submitted: whether it fits, how long it takes, and in how many jobs.

``checks.check_ready`` has it made beside its other checks (train.py --plan-for); docs/planning.md describes the plan.
A plan is advice: whatever keeps the planner from one is said in a sentence, and the run is submitted all the same.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from statistics import median
from typing import Any

from refiner_ds.amounts import amount
from refiner_ds.errors import ConfigError, LaunchError
from refiner_ds.gpus import gpu
from refiner_ds.run_folder import RunFolder

from . import local
from .allocation import Allocation
from .diagnosis import last_lines

GIB, MIB = 2**30, 2**20
Plan = dict[str, Any]


def machines(allocation: Allocation) -> dict[str, Any] | None:
    """What to plan for, as train.py takes it; None where nothing says what GPU, or how much memory, there is."""
    nodes, each = (1, allocation.world_size) if allocation.local else (allocation.nodes, allocation.tasks)
    found: dict[str, Any] = {"gpu": None, "nodes": nodes, "per_node": each}
    if allocation.gpus:
        name = _gpu_name(allocation)
        return None if name is None else {**found, "gpu": name}
    if allocation.local:
        return found
    memory = allocation.mem_mb or (allocation.has.mem_mb if allocation.has else 0)
    return {**found, "memory_gib": memory * MIB / GIB / each} if memory > 1 else None


def _gpu_name(allocation: Allocation) -> str | None:
    profile, has = allocation.profile, allocation.has
    known = local.gpu_name() if allocation.local else has.gpu_type if has else ""
    for named in (profile.gpu, str(profile.gpus_per_node).rpartition(":")[0], known):
        if named:
            with suppress(ConfigError):
                return gpu(named).name
    return None


def read(printed: str) -> Plan | None:
    """The plan in the last line of what train.py printed, or why there is none ("failed"); None where none was made."""
    with suppress(ValueError, IndexError):
        found = json.loads(printed.strip().splitlines()[-1])
        return found if isinstance(found, dict) and found.keys() & {"memory", "failed"} else None
    return None


def problem(plan: Plan | None) -> str:
    """Why there is no plan, in a sentence; empty where there is one, or nothing to plan for."""
    return f"could not plan: {plan['failed']}" if plan and "failed" in plan else ""


def refuse_too_large(plan: Plan | None, allocation: Allocation) -> None:
    """Raise LaunchError where a run does not fit, with what would make it fit."""
    if plan is None or "failed" in plan:
        return
    try:
        refusal = _refusal(plan, allocation)
    except Exception:  # `summary` says it
        return
    if refusal:
        raise LaunchError(refusal)


def _refusal(plan: Plan, allocation: Allocation) -> str:
    if plan["memory"]["fits"]:
        return ""
    memory, unit = plan["memory"], "GPU" if allocation.gpus else "process"
    remedies = sorted(memory["remedies"], key=lambda remedy: not remedy["fits"])
    said = ""
    if remedies:
        then = ", then it fits" if remedies[0]["fits"] else ", which is not enough"
        said = f"--set {remedies[0]['set']} saves {remedies[0]['saves'] / GIB:.2f} GiB{then}; "
    return (
        f"{allocation.run.path}: needs {memory['needed'] / GIB:.2f} GiB a {unit}, and there are"
        f" {memory['capacity'] / GIB:.2f}; {said}--ignore-plan submits it all the same"
    )


def summary(plan: Plan | None, allocation: Allocation) -> list[str]:
    """Memory, steps, hours and the time limit, a line each; where there is no plan, why not."""
    if plan is None:
        return [*_no_plan(allocation), *_limit(allocation, None)]
    if "failed" not in plan:
        try:
            return _summary(plan, allocation)
        except Exception as error:  # a plan that cannot be read is none
            plan = {"failed": f"{type(error).__name__}: {error}"}
    return [problem(plan), *_limit(allocation, None)]


def _summary(plan: Plan, allocation: Allocation) -> list[str]:
    memory, unit = plan["memory"], "GPU" if allocation.gpus else "process"
    needed = f"{memory['needed'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB a {unit}"
    hours, words = _hours(plan, allocation)
    return [f"plan: {', '.join(filter(None, (needed, words)))}", *_limit(allocation, hours)]


def _no_plan(allocation: Allocation) -> list[str]:
    if allocation.gpus and machines(allocation) is None:
        return ["no plan of memory and time: Slurm names no GPU type; set gpu in the cluster profile, such as h200"]
    return []


def _hours(plan: Plan, allocation: Allocation) -> tuple[float | None, str]:
    """Hours that are left, by the run's own steps where it has taken some, else by the plan's bound; and in words."""
    steps = plan["cost"]["steps"]
    if steps is None:
        return None, "steps unknown without the data"
    done, measured = _so_far(RunFolder(allocation.run.folder))
    left = max(0, steps - done)
    words = f"{left:,} steps" + (" left" if done else "")
    seconds = measured or plan["step"]["seconds"]
    if seconds is None:
        return None, words
    hours, unit = left * seconds / 3600, "GPU" if allocation.gpus else "process"
    basis, bound = f"at {seconds:.3g} s a step, as before", ""
    if not measured and plan["step"]["basis"] == "measured":
        basis = f"at {seconds:.3g} s a step, as measured on {plan['step']['measured']['date']}"
    elif not measured:
        basis, bound = f"at {plan['gpu']}'s data-sheet rates", "at least "
    return hours, f"{words}, {bound}{amount(hours)} hours, {amount(hours * plan['processes'])} {unit}-hours ({basis})"


def _so_far(folder: RunFolder) -> tuple[int, float | None]:
    """The last step that a run has logged, and the median of its newest steps' seconds."""
    step, seconds = 0, []
    for line in last_lines(folder.metrics):
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["kind"] == "train":
                step = int(entry["step"])
                seconds.append(float(entry["step_seconds"]))
    return step, median(seconds) if seconds else None


def _limit(allocation: Allocation, hours: float | None) -> list[str]:
    has, profile = allocation.has, allocation.profile
    minutes = profile.minutes or (has and (has.default_limit or has.limit))
    if not minutes:
        return []
    limit = f"time limit: {minutes / 60:.3g} hour{'' if minutes == 60 else 's'} a job"
    if hours is None:
        return [limit]
    restarts = math.ceil(60 * hours / minutes) - 1
    if restarts <= 0:
        return [f"{limit}, one job may do"]
    times = f"{restarts} time{'' if restarts == 1 else 's'}"
    if profile.requeue:
        return [f"{limit}: requeued at least {times}"]
    return [f"warning: a {limit.replace(': ', ' of ')} is not enough, and with requeue: false the run stops there"]
