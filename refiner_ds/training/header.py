"""The block of lines that a run begins with: what is trained, on what, how, and for how long."""

from __future__ import annotations

import torch

from refiner_ds.training.attention_cases import attention_line
from refiner_ds.training.build import build_model, parameter_count, training_flops
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World


def header(ready: Preparation, world: World, bf16: bool, chosen: str = "") -> dict[str, str]:
    """Lines by what they are about.

    Args:
        bf16: whether the engine trains in bf16.
        chosen: why these backends compute attention, where they were chosen.
    """
    run, keys, schedule = ready.run, ready.run.refiner, ready.schedule
    with torch.device("meta"):
        model = build_model(run, ready.num_classes)
    parameters = parameter_count(model)
    gflop = training_flops(run, ready.num_classes) / 1e9
    processes = f"{world.size} process{'es' * (world.size > 1)} on {world.device.type.upper()}"
    recomputed = {"none": "nothing", "pair": "pairs of blocks", "block": "blocks", "refiner": "refiners"}
    lines = {
        "model": f"{keys.model.name} at {keys.model.img_size} px, {parameters:,} parameters, {gflop:.3g} GFLOP an image"
        " (forward and backward)",
        "batch": str(ready.batch),
        "engine": f"{processes}, {'bf16' if bf16 else 'fp32'}, ZeRO stage {run.keys.zero_optimization.stage},"
        f" recomputing {recomputed[keys.model.checkpointing]}"
        + (f", the model compiled by {keys.model.compile}" if keys.model.compile != "none" else ""),
        "attention": attention_line(run, model, world, torch.bfloat16 if bf16 else torch.float32, chosen),
        "training": ready.train.describe(),
    }
    if ready.maps is not None and ready.maps is not ready.train:
        lines["score maps"] = ready.maps.describe()
    if ready.val is not None:
        lines["validation"] = ready.val.describe()
    if ready.val_note:
        lines["classes"] = ready.val_note
    steps = f"{schedule.steps_an_epoch:,} an epoch, {schedule.total_steps:,} in all"
    lines["steps"] = f"{steps}; learning rate {schedule.peak:.3g} at its peak"
    lines["run folder"] = str(run.folder)
    return lines
