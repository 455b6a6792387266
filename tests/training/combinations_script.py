"""On every rank: train a tiny model with each row of keys, at each ZeRO stage, as it is and compiled.

    combinations_script.py REPORT STAGES ROWS       lists in JSON; of rows, names in EVERY_ROW

REPORT gets, by "row | stage | compiled", how far weights and statistics ended from those of the same row that it is to
be like (the first stage; or, compiled, the same stage as it is), over the way they had come; or the sentence of a
refusal. As "graphs" it gets how many were compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from refiner_ds.config import RunFile, load
from refiner_ds.errors import ConfigError
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.engine import Engine
from refiner_ds.training.initial_weights import initial_weights
from refiner_ds.training.logs import silence_libraries
from refiner_ds.training.losses import token_label_loss
from refiner_ds.training.world import World, init
from tests.training.engine_script import SIZES, fresh_model, images_of

STEPS, CLASSES = 2, [str(number) for number in range(10)]
STARTED_FROM = "started_from.safetensors"
# Buckets of DeepSpeed's own size are 2 GB, whatever the model's.
SETTINGS = [
    *(f"refiner.model.{size}" for size in SIZES), "bf16.enabled=false", "train_batch_size=16",
    "train_micro_batch_size_per_gpu=4", "refiner.recipe.eps=1e-3", "refiner.model.checkpointing=none",
    "zero_optimization.reduce_bucket_size=100000", "zero_optimization.stage3_prefetch_bucket_size=100000",
]  # fmt: skip
ROWS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["bf16.enabled=true"],
    "bf16, `grad_accum_dtype` fp32": ["bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
    "`checkpointing` pair": ["refiner.model.checkpointing=pair"],
    "`checkpointing` refiner": ["refiner.model.checkpointing=refiner"],
    "`checkpointing` pair, by DeepSpeed": ["refiner.model.checkpointing=pair", "activation_checkpointing={}"],
    "`sync_batch_norm`, `cos_reg`, `init_from`, `freeze`": [
        "refiner.model.sync_batch_norm=true",
        "refiner.model.cos_reg=0.1",
        f"refiner.model.init_from={STARTED_FROM}",
        'refiner.model.freeze=["patch_embed", "blocks.0.mlp"]',
    ],  # fmt: skip
}
# DeepSpeed compiles its AdamW for these, which takes the better part of a minute on a fresh machine.
OFFLOAD = 'zero_optimization.offload_optimizer={"device": "cpu"}'
OFFLOADED: dict[str, list[str]] = {
    "`offload_optimizer`": [OFFLOAD],
    "`offload_optimizer`, bf16": [OFFLOAD, "bf16.enabled=true"],
    "`offload_optimizer` and `offload_param`": [OFFLOAD, 'zero_optimization.offload_param={"device": "cpu"}'],
}
EVERY_ROW = {**ROWS, **OFFLOADED}
BACKEND = "aot_eager"


def run_file(row: str, stage: int, compiled: bool) -> RunFile:
    """The run file of a cell; raises ConfigError where it is refused."""
    backend = BACKEND if compiled else "none"
    stage_and_backend = (f"zero_optimization.stage={stage}", f"refiner.model.compile={backend}")
    return load(None, [*SETTINGS, *stage_and_backend, *EVERY_ROW[row]])


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for value in tensors.values()])


def train(run: RunFile, world: World) -> tuple[Tensor, Tensor]:
    """Weights and statistics, flat, before and after some steps."""
    torch.manual_seed(5)
    model = fresh_model(run)
    if run.refiner.model.init_from is not None:
        model.load_state_dict(initial_weights(run, model, CLASSES)[0])
    set_recompute(run, model)
    start = flat({name: value.clone() for name, value in model.state_dict().items()})
    batch = run.batch(world.size)
    engine = Engine(run, model, batch, world)
    assert engine.engine.is_compiled is (run.refiner.model.compile != "none")
    names = list(model.state_dict())
    for step in range(STEPS):
        engine.set_lr(2e-3)
        for micro in range(batch.accumulation):
            images, labels = images_of(step, world.rank, micro)
            images = images.to(torch.bfloat16 if engine.bf16 else torch.float32)
            cls_BC, patch_BPC, _ = engine(images, mix_box=(1, 1, 4, 3))
            target_BC = torch.nn.functional.one_hot(labels, 10).float()
            losses = token_label_loss(cls_BC, patch_BPC, target_BC, target_BC[:, None], 1.0, 0.5)
            if run.refiner.model.cos_reg:
                losses = losses.plus("cos", engine.module.cos_reg_loss())
            engine.backward_and_step(losses.total)
    found = {**engine.full_weights(), **{name: value.clone() for name, value in engine.statistics().items()}}
    engine.close()
    return start, flat({name: found[name] for name in names})


def train_row(row: str, stages: list[int], world: World) -> dict[str, object]:
    """What became of each cell of a row at these stages."""
    found: dict[str, object] = {}
    ends: dict[tuple[int, bool], Tensor] = {}
    for stage in stages:
        for compiled in (False, True):
            cell = f"{row} | {stage} | {compiled}"
            try:
                run = run_file(row, stage, compiled)
            except ConfigError as refusal:
                found[cell] = str(refusal)
                continue
            start, end = train(run, world)
            ends[stage, compiled] = end
            like = ends[stage, False] if compiled else ends[min(ends)]
            found[cell] = float((end - like).norm() / (like - start).norm())
    return found


def main() -> None:
    silence_libraries()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # rows are models of one class; what they share is compiled once
    world = init()
    if world.is_main:
        torch.manual_seed(7)
        save_file(build_model(run_file("fp32", 0, False), 10).state_dict(), STARTED_FROM)
    world.barrier()
    found: dict[str, object] = {}
    for row in json.loads(sys.argv[3]):
        found |= train_row(row, json.loads(sys.argv[2]), world)
    found["graphs"] = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
