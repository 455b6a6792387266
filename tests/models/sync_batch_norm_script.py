"""On two ranks: a model with synchronised batch norms on half a batch each, beside one process with the whole.

Writes the largest relative distance of loss, gradients and running statistics, by how activations are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from refiner_ds.models import SyncBatchNorm
from tests.models.small import BOX, RELEASED, small_model


def step(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    class_logits, patch_logits, _ = model.train()(images, BOX)
    loss = class_logits.square().mean() + patch_logits.square().mean()
    loss.backward()
    return loss.detach()


def distances(unit: str | None) -> dict[str, float]:
    # Mix-token pairs the batch with its reverse: each half must pair as it does within the whole.
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    rank = dist.get_rank()
    whole, model = small_model(**RELEASED).double(), small_model(**RELEASED).double()
    loss = step(whole, images)
    SyncBatchNorm.convert(model)
    if unit is not None:
        model.set_grad_checkpointing(unit=unit)
    mine = torch.cat([images[2 * rank : 2 * rank + 2], images[6 - 2 * rank : 8 - 2 * rank]])
    ours = step(model, mine)
    dist.all_reduce(ours)
    found = {"loss": abs(ours / 2 - loss).item()}
    largest = max(parameter.grad.abs().max() for parameter in whole.parameters())
    for (_, one), (_, other) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        dist.all_reduce(one.grad)
        found["gradients"] = max(
            found.get("gradients", 0.0), ((one.grad / 2 - other.grad).abs().max() / largest).item()
        )
    buffers = dict(whole.named_buffers())
    for name, buffer in model.named_buffers():
        relative = ((buffer - buffers[name]).abs() / buffers[name].abs().clamp_min(1e-12)).max().item()
        found["statistics"] = max(found.get("statistics", 0.0), relative)
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {str(unit): distances(unit) for unit in (None, "block", "refiner")}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
