"""What a job has cost: GPU-hours, those of them in which nothing was trained, and steps that were done twice."""

from __future__ import annotations

import time

from refiner_ds.files import has_numbers, read_objects
from refiner_ds.run_folder import RunFolder

from .attempts import Attempts


def training_seconds(run_folder: RunFolder, since: float) -> float:
    """Seconds that optimizer steps took, as training logged them, from a moment (unix seconds) on."""
    seconds, before = 0.0, None
    for line in read_objects(run_folder.metrics):
        if line.get("kind") == "train" and has_numbers(line, "step", "time", "step_seconds"):
            steps = line["step"] - before if before is not None and line["step"] > before else 1
            if line["time"] >= since:
                seconds += steps * line["step_seconds"]
            before = line["step"]
    return seconds


def hours_held(attempts: Attempts, now: float) -> tuple[float, str]:
    """GPU-hours held so far, or process-hours on CPUs; and which of the two."""
    gpus = any(record.gpus for record in attempts.records)
    held = ((record.gpus or record.tasks) * ((record.ended or now) - record.started) for record in attempts.records)
    return sum(held) / 3600, "GPU-hours" if gpus else "process-hours"


def cost_line(run_folder: RunFolder | None, attempts: Attempts) -> str:
    """GPU-hours (node-hours of the processes, without GPUs), idle ones among them, and lost steps, in a sentence.

    Args:
        run_folder: None where the job does not train.
    """
    now = time.time()
    hours, unit = hours_held(attempts, now)
    restarts = len(attempts.records) - 1
    again = f"{restarts} restart{'' if restarts == 1 else 's'}"
    if run_folder is None:
        return f"cost: {hours:.2f} {unit}; {again}"
    held = sum((record.ended or now) - record.started for record in attempts.records)
    began = attempts.records[0].started if attempts.records else now
    trained = min(held, training_seconds(run_folder, began))
    idle = 100 * (1 - trained / held) if held else 0.0
    outside = f"of them {idle:.0f} % outside training steps"
    return f"cost: {hours:.2f} {unit}, {outside}; {again}, {attempts.lost_steps} steps done twice"
