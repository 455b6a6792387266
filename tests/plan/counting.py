"""Counts by real tensors what the planner counts by fake ones.

    python -m tests.plan.counting       every size that this machine's memory holds, as the table of docs/planning.md

Bytes saved for backward come from autograd's hooks, the peak from the allocator's events that torch.profiler records.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from refiner_ds.attention import attention_backend, set_save_for_backward
from refiner_ds.config import RunFile, load
from refiner_ds.models import RefinedViT
from refiner_ds.plan.trace import Trace, trace
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.losses import class_loss, token_label_loss

CLASSES = 1000
MEMORY = 20 << 30


@dataclass(frozen=True)
class Counted:
    """Bytes of one micro-batch, inputs included in the peak."""

    saved: int
    peak: int


def run_file(model: str, img_size: int, checkpointing: str, save_for_backward: str, *more: str) -> RunFile:
    """A run file of the released recipe with these keys."""
    keys = {
        "refiner.model.name": model,
        "refiner.model.img_size": img_size,
        "refiner.model.checkpointing": checkpointing,
        "refiner.model.save_for_backward": save_for_backward,
        "bf16.enabled": "false",
    }
    return load("ds_configs/refiner_s.json", [*(f"{key}={value}" for key, value in keys.items()), *more])


def planned(run: RunFile, images: int, backend: str) -> Trace:
    """What the planner counts on a CPU of ``MEMORY`` bytes."""
    return trace(run, CLASSES, images, False, backend, MEMORY, gpu=False)


def counted(run: RunFile, images: int, backend: str) -> Counted:
    """A real forward and backward pass in fp32."""
    keys, recipe = run.refiner.model, run.refiner.recipe
    model = build_model(run, CLASSES).train()
    set_recompute(run, model)
    set_save_for_backward(keys.save_for_backward)
    pixels = torch.zeros(images, keys.img_size, keys.img_size, 3, dtype=torch.uint8)
    batch = torch.randn(images, 3, keys.img_size, keys.img_size)
    target_BC = torch.rand(images, CLASSES)
    target_BPC = torch.rand(images, model.patch_grid[0] * model.patch_grid[1], CLASSES)
    given = (pixels, batch, target_BC, target_BPC)
    known = {tensor.untyped_storage()._cdata for tensor in (*given, *model.parameters(), *model.buffers())}
    held, saved = [], 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            held.append(storage)  # or its address could be given to another
            saved += storage.nbytes()
        return tensor

    def loss(model: RefinedViT) -> Tensor:
        out = model(batch)
        if isinstance(out, Tensor):
            losses = class_loss(out, target_BC, recipe.cls_weight)
        else:
            losses = token_label_loss(out[0], out[1], target_BC, target_BPC, recipe.cls_weight, recipe.dense_weight)
        return losses.plus("cos", model.cos_reg_loss()).total if keys.cos_reg else losses.total

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with attention_backend(backend):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            first = loss(model)
        held.clear()
        first.backward()
        del first
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss(model).backward()
    assert profiler.profiler is not None
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    now = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        now += size
        peak = max(peak, now)
    return Counted(saved, peak + sum(tensor.nbytes for tensor in given))


def main() -> int:
    """Print the table, a line as soon as it is known; of the models that are named, or of all."""
    print("| model | px | checkpointing | save_for_backward | saved, MiB | planned | peak, MiB | planned |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in sys.argv[1:] or ("refiner_vit_s", "refiner_vit_m", "refiner_vit_l"):
        for img_size in (224, 384, 448):
            for checkpointing in ("none", "pair", "refiner"):
                for save in ("map", "activations"):
                    run = run_file(model, img_size, checkpointing, save)
                    plan = planned(run, 1, "tiled")
                    saved, row = sum(plan.saved.values()), f"| {model} | {img_size} | {checkpointing} | {save} |"
                    if 2 * plan.peak > MEMORY:
                        print(f"{row} not counted | {saved / 2**20:,.1f} | not counted | {plan.peak / 2**20:,.1f} |")
                        continue
                    real = counted(run, 1, "tiled")
                    print(
                        f"{row} {real.saved / 2**20:,.1f} | {saved / real.saved:.4f} |"
                        f" {real.peak / 2**20:,.1f} | {plan.peak / real.peak:.4f} |",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
