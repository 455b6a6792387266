"""On every rank: train a small model at each ZeRO stage and precision beside a plain fp32 loop over the same images.

Writes, for each case and summed over ranks, six distances relative to the way that was come: of weights and statistics
from the plain loop's, of their averages from the plain loop's, of their averages from averages taken by hand of the
engine's own weights; seventh, how many ranks did not find their weights as they were once averages were read; and,
eighth, of the gradient norms by part in the first step from the plain loop's, largest, relative to the whole norm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from refiner_ds.config import load
from refiner_ds.training import engine as engine_module
from refiner_ds.training.build import build_model
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine, build_optimizer
from refiner_ds.training.exchange import StepExchange
from refiner_ds.training.gradient_norms import GradientNorms, part_of
from refiner_ds.training.logs import silence_libraries
from refiner_ds.training.losses import token_label_loss
from refiner_ds.training.world import World, init

STEPS, DECAY = 4, 0.25
SIZES = ["layout=released", "refiner=bottleneck", "depth=2", "embed_dim=16", "num_heads=2", "stem_chs=[4,4,4]"]


def run_file(stage: int, bf16: bool, batch: int = 16, micro: int = 4, others: Sequence[str] = ()):
    overrides = [f"refiner.model.{size}" for size in SIZES]
    overrides += [f"zero_optimization.stage={stage}", f"bf16.enabled={json.dumps(bf16)}", f"train_batch_size={batch}"]
    overrides += [f"train_micro_batch_size_per_gpu={micro}", "refiner.recipe.lr=2e-3", "refiner.recipe.eps=1e-3"]
    return load(None, [*overrides, *others])


def fresh_model(run) -> nn.Module:
    torch.manual_seed(5)
    model = build_model(run, 10)
    for name, weight in model.named_parameters():
        if "qkv.weight" in name:
            # Fresh maps are so flat that batch norms magnify rounding into gradients; peaked ones are well-conditioned.
            weight.data *= 20
    return model


def images_of(step: int, rank: int, micro: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randn(count, 3, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)


def loss_of(model, images_B3HW: Tensor, labels_B: Tensor):
    cls_BC, patch_BPC, _ = model(images_B3HW, mix_box=(1, 1, 4, 3))
    target_BC = nn.functional.one_hot(labels_B, 10).float()
    return token_label_loss(cls_BC, patch_BPC, target_BC, target_BC[:, None], 1.0, 0.5)


def plain_loop(
    world_size: int, accumulation: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """What one process in fp32 gets from the same images: weights and ema, statistics averaged over 'ranks'; norms."""
    run = run_file(0, False)
    model = fresh_model(run).train()
    optimizer = build_optimizer(run, model)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    norms: list[dict[str, float]] = []
    for step in range(STEPS):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after: list[dict[str, Tensor]] = []
        for rank in range(world_size):
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            for micro in range(accumulation):
                (loss_of(model, *images_of(step, rank, micro)).total / (world_size * accumulation)).backward()
            after.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.stack([part[name] for part in after]).mean(0))
        norms.append(norms_by_part(model))
        nn.utils.clip_grad_norm_(model.parameters(), run.keys.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            ema[name] = ema[name].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    return {name: value.clone() for name, value in model.state_dict().items()}, ema, norms


def norms_by_part(model: nn.Module) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        squares[part_of(name)] = squares.get(part_of(name), 0.0) + float(parameter.grad.double().square().sum())
    return {part: square**0.5 for part, square in sorted(squares.items())}


def engine_loop(
    stage: int, bf16: bool, world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], bool, dict[str, float]]:
    run = run_file(stage, bf16)
    engine_module.FUSED_ON = ("cpu",) if bf16 and stage % 2 else ("cuda",)  # the GPU's, at two of the stages
    batch = run.batch(world.size)
    engine = Engine(run, fresh_model(run), batch, world)
    ema = ModelEma(engine, DECAY, warmup=True)
    exchange = StepExchange(engine.statistics(), world)
    gradients = GradientNorms(engine, world)
    norms: dict[str, float] = {}
    by_hand = {name: value.clone() for name, value in {**engine.full_weights(), **engine.statistics()}.items()}
    for step in range(STEPS):
        engine.set_lr(run.refiner.recipe.lr)
        gradients.watch()
        for micro in range(batch.accumulation):
            images, labels = images_of(step, world.rank, micro)
            losses = loss_of(engine, images.to(torch.bfloat16 if bf16 else torch.float32), labels)
            engine.backward_and_step(losses.total)
        exchange.mean(torch.zeros(1))
        by_part = gradients.finish()
        assert by_part is not None
        norms = norms or dict(zip(gradients.parts, by_part.tolist(), strict=True))
        ema.update(step)
        decay = min(DECAY, (1 + step) / (10 + step))
        seen = {**engine.full_weights(), **engine.statistics()}
        for name, value in seen.items():
            by_hand[name] = by_hand[name].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    assert engine.grad_norm is not None and engine.grad_norm > 0
    weights, averaged = engine.full_weights(), ema.state_dict()
    exact = all(torch.equal(value, weights[name]) for name, value in engine.full_weights().items())
    buffers = {name: buffer.clone() for name, buffer in engine.statistics().items()}
    engine.close()
    return {**weights, **buffers}, averaged, by_hand, exact, norms


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> list[float]:
    """Distance of weights, and of statistics, from what is wanted, over the way these have come from the start."""
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    distances = []
    for kind in (False, True):
        names = [name for name in wanted if ("running" in name) is kind and wanted[name].is_floating_point()]
        off = torch.cat([(found[name].float() - wanted[name]).flatten() for name in names]).norm()
        way = torch.cat([(wanted[name] - start[name]).flatten() for name in names]).norm()
        distances.append(float(off / way))
    return distances


def main() -> None:
    silence_libraries()
    torch.set_num_threads(1)
    world = init()
    weights, ema, wanted = plain_loop(world.size, 16 // 4 // world.size)
    start = fresh_model(run_file(0, False)).state_dict()
    found = {}
    for stage in range(4):
        for bf16 in (False, True):
            mine, averaged, by_hand, exact, norms = engine_loop(stage, bf16, world)
            assert norms.keys() == wanted[0].keys()
            whole = sum(norm**2 for norm in wanted[0].values()) ** 0.5
            off = max(abs(norm - wanted[0][part]) for part, norm in norms.items()) / whole
            distances = apart(mine, weights, start) + apart(averaged, ema, start) + apart(averaged, by_hand, start)
            found[f"{stage} {'bf16' if bf16 else 'fp32'}"] = world.all_reduce_sum(
                torch.tensor([*distances, not exact, off])
            ).tolist()
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
