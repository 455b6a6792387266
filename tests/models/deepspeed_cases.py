"""What only a process with DeepSpeed up can tell, as one JSON line: run by test_deepspeed.py in a process of its own.

{"recompute": {"released pair": [what differs], …}, "fp32 loop": losses, "fp32": {stage: losses, …}, "bf16": …,
 "init": {"zero.Init": {parameter: spread, …}, "plain": …}, "fsdp2": {what is wrapped: distance, …}, "ddp": losses}
"""

from __future__ import annotations

import json

import deepspeed
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, mse_loss

from refiner_ds.training.world import init, shutdown
from tests.models.small import BOX, PAPER, RANDOM, RELEASED, differences, pictures, small_model, training_step

STEPS = 3


def recompute() -> dict[str, list[str]]:
    """What differs to the bit between DeepSpeed's checkpoint and none, by unit and layout."""
    found = {}
    for layout in (RELEASED, PAPER):
        plain = training_step(small_model(**layout, **RANDOM))
        for unit in ("pair", "block", "refiner"):
            model = small_model(**layout, **RANDOM)
            model.set_grad_checkpointing(unit=unit, checkpoint=deepspeed.checkpointing.checkpoint)
            found[f"{layout['layout']} {unit}"] = differences(training_step(model), plain)
    return found


def train(stage: int, half: bool) -> dict:
    """A few engine steps at a ZeRO stage; parameters are created under zero.Init at stage 3."""
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,  # the default is 1.0
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
    }
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = small_model(**RELEASED)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            model.load_state_dict(small_model(**RELEASED).state_dict())
    else:
        model = small_model(**RELEASED)
    model.set_grad_checkpointing(unit="block")
    engine = deepspeed.initialize(model=model, config=config)[0]
    losses = []
    for _ in range(STEPS):
        class_logits, patch_logits, _ = engine(pictures(), BOX)
        loss = loss_of(class_logits, patch_logits)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    buffers = dict(model.named_buffers())
    result = {
        "losses": losses,
        "statistics": sorted({str(value.dtype) for name, value in buffers.items() if "running" in name}),
        "counted": sorted({int(value) for name, value in buffers.items() if "num_batches" in name}),
        "running_var": buffers["blocks.3.attn.adapt_bn.running_var"].tolist(),
    }
    engine.destroy()
    return result


def loss_of(class_logits, patch_logits):
    """Regression on ones: smooth, and it can be learned."""
    return sum(mse_loss(logits.float(), torch.ones_like(logits.float())) for logits in (class_logits, patch_logits))


def plain_losses() -> dict:
    """The same steps without DeepSpeed, in fp32."""
    model = small_model(**RELEASED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        class_logits, patch_logits, _ = model(pictures(), BOX)
        loss = loss_of(class_logits, patch_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "running_var": model.blocks[3].attn.adapt_bn.running_var.tolist()}


def initialisation() -> dict[str, dict[str, float]]:
    """The spread of every parameter, created with and without zero.Init."""
    config = {"train_batch_size": 4, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        sharded = small_model(**RELEASED)
    with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
        spreads = {name: value.float().std().item() for name, value in sharded.named_parameters()}
    whole = {name: value.std().item() for name, value in small_model(**RELEASED).named_parameters()}
    return {"zero.Init": spreads, "plain": whole}


def fully_sharded() -> dict[str, float]:
    """Largest relative distance of FSDP2's gradients from plain ones, by what is wrapped on its own."""
    found = {}
    _, wanted, _ = training_step(small_model(**RELEASED))
    for wrapped in ("root", "blocks", "layers"):
        model = small_model(**RELEASED)
        mesh = init_device_mesh("cpu", (1,))
        layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.LayerNorm, nn.Conv2d)]
        for module in [*(layers if wrapped == "layers" else []), *(model.blocks if wrapped != "root" else []), model]:
            fully_shard(module, mesh=mesh)
        torch.manual_seed(1)
        class_logits, patch_logits, _ = model.train()(pictures(), BOX)
        (class_logits.square().mean() + patch_logits.square().mean()).backward()
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        distances = [
            (parameter.grad.full_tensor() - wanted[name]).abs().max().item() / largest
            for name, parameter in model.named_parameters()
        ]
        found[wrapped] = max(distances)
    return found


def data_parallel() -> list[float]:
    """Losses of a plain DistributedDataParallel loop on class logits; it refuses parameters without a gradient."""
    model = nn.parallel.DistributedDataParallel(small_model(**RELEASED, return_dense=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = cross_entropy(model(pictures()), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    init()
    results = {
        "recompute": recompute(),
        "fp32 loop": plain_losses(),
        "fp32": {stage: train(stage, half=False) for stage in (0, 1, 2, 3)},
        "bf16": {stage: train(stage, half=True) for stage in (0, 1, 2, 3)},
        "init": initialisation(),
        "fsdp2": fully_sharded(),
        "ddp": data_parallel(),
    }
    print("RESULT " + json.dumps(results))
    shutdown()
