"""A model small enough to step in a hundredth of a second, with every kind of randomness switched on."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import refiner_ds.models

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 4, "num_classes": 5}
RANDOM = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "drop_rate": 0.1}
BOX = (1, 1, 3, 3)

RELEASED = {"layout": "released", "refiner": "bottleneck"}
PAPER = {"layout": "paper", "refiner": "linear"}
VARIANTS = {
    "released": RELEASED,
    "released-linear": {**RELEASED, "refiner": "linear"},
    "paper": PAPER,
    "paper-bottleneck": {**PAPER, "refiner": "bottleneck"},
    "paper-spatial": {**PAPER, "constraint": "spatial"},
    "paper-row+col": {**PAPER, "constraint": "row+col"},
    "paper-no-reduction": {**PAPER, "reduce": False},
    "local-alone": {**PAPER, "expand": False},
    "plain-released": {"layout": "released", "refiner": "none"},
    "plain": {"layout": "paper", "refiner": "none"},
}


def small_model(seed: int = 0, **options) -> refiner_ds.models.RefinedViT:
    """The model, always with the same weights for a seed; ``init_values`` is large enough for MLPs to matter."""
    torch.manual_seed(seed)
    scale = {"init_values": 0.5} if options.get("layout") == "released" else {}
    model = timm.create_model("refined_vit", **{**SMALL, "stem_chs": (4, 8, 8), **scale, **options})
    assert isinstance(model, refiner_ds.models.RefinedViT)
    return model


def pictures(count: int = 4, size: int = 32) -> Tensor:
    """The same pictures each time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def training_step(model: nn.Module, seed: int = 1) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, every gradient and every buffer after one forward and backward from a seed."""
    torch.manual_seed(seed)
    class_logits, patch_logits, _ = model.train()(pictures(), BOX)
    loss = class_logits.square().mean() + patch_logits.square().mean()
    if getattr(model, "cos_reg", 0):
        loss = loss + model.cos_reg_loss()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


def differences(one, other) -> list[str]:
    """Names of what is not the same to the bit in two results of :func:`training_step`."""
    names = [] if torch.equal(one[0], other[0]) else ["loss"]
    for ours, theirs in zip(one[1:], other[1:], strict=True):
        assert ours.keys() == theirs.keys()
        names += [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return names
