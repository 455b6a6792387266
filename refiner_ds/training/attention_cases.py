"""The kinds of attention a model has, as its layers will be called in training, and what computes each."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from refiner_ds.attention import DeferredMap, choose_backend, resolve_backend
from refiner_ds.attention.choice import Layer
from refiner_ds.config import RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.models.attention import MapAttention, PlainAttention, RefinedAttention, SharedAttention
from refiner_ds.training.world import World

AnyAttention = MapAttention | PlainAttention | RefinedAttention | SharedAttention


def attention_line(run: RunFile, model: RefinedViT, world: World, dtype: torch.dtype, why: str = "") -> str:
    """ "map: tiled, bottleneck: tiled (tiled is the default on CPUs)".

    Args:
        model: on the meta device; only its shapes matter. It is used up.
        dtype: of the parameters in training.
        why: these backends were chosen; "" where nothing was.
    """
    device = world.device
    found = attention_kinds(run, model, world, dtype)
    said = ", ".join(f"{kind}: {one if isinstance(one, str) else _named(one)}" for kind, one in found.items())
    requested = resolve_backend(device=device)
    if os.environ.get("REFINER_ATTENTION"):
        why = f"{requested} is asked for"  # by the run file or in the environment
    else:
        why = why or f"{requested} is the default on {'GPUs' if device.type == 'cuda' else 'CPUs'}"
    return f"{said} ({why})"


def attention_kinds(
    run: RunFile, model: RefinedViT, world: World, dtype: torch.dtype, images: int = 1
) -> dict[str, Layer | str]:
    """Every kind of attention: a layer of it, or what computes it whatever is chosen.

    Args:
        model: on the meta device; it is used up.
        dtype: of the parameters in training.
        images: the micro-batch.
    """
    synchronised = run.refiner.model.sync_batch_norm and world.size > 1
    found: dict[str, Layer | str] = {}
    alive: dict[str, int] = {}
    for block in model.train().blocks:
        kind, layer = _kind(block.attn, world.device, dtype, synchronised)
        found.setdefault(kind, layer)
        alive[kind] = alive.get(kind, 0) + 1
    unit = run.refiner.model.checkpointing
    for kind, one in found.items():
        if isinstance(one, Layer):
            # Recomputed, one such layer at a time holds what it saves.
            at_once = alive[kind] if unit == "none" or (unit == "refiner" and kind == "map") else 1
            found[kind] = one._replace(
                images=images, at_once=at_once, save_for_backward=run.refiner.model.save_for_backward
            )
    return found


def _kind(
    attn: torch.nn.Module, device: torch.device, dtype: torch.dtype, synchronised: bool
) -> tuple[str, Layer | str]:
    """What an attention module is called here, and a call of it."""
    assert isinstance(attn, (MapAttention, PlainAttention, RefinedAttention, SharedAttention))
    if isinstance(attn, PlainAttention) and not attn.passes_map:
        return "attention", "PyTorch's fused kernels"
    q_BHNd, k_BHNd, v_BHNd = _heads(attn, device, dtype)
    deferred = DeferredMap(q_BHNd, k_BHNd, attn.scale, attn.attn_drop)
    layer = Layer("map", deferred, v_BHNd, None, 1.0, False, 1, 1, "auto")
    if isinstance(attn, (MapAttention, PlainAttention)):
        return "map", layer
    kind = "bottleneck" if hasattr(attn, "DLA") else "linear"
    if kind == "bottleneck" and synchronised:
        return kind, "eager, because its batch norms take statistics over ranks"
    _fill(attn.to_empty(device=device), dtype)
    if (weights := attn.weights()) is None:
        return kind, "eager, because its layers are called one by one"
    takes_map = isinstance(attn, SharedAttention) or attn.passes_map
    return kind, layer._replace(kind=kind, weights=weights, scale=attn.refined_scale, takes_map=takes_map)


def _fill(attn: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a module weights of ordinary size: numbers that happen to lie in memory may be slow to compute with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in attn.parameters():  # alone: statistics are fp32
        drawn = torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5
        parameter.data = (drawn if parameter.dim() > 1 else torch.ones(parameter.shape)).to(parameter.device, dtype)
    for name, buffer in attn.named_buffers():
        buffer.fill_(1 if name.endswith("running_var") else 0)


def _heads(attn: AnyAttention, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads, grid, scale = attn.num_heads, attn.grid, attn.scale
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, 1 + grid[0] * grid[1], round(scale**-2))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def _named(layer: Layer) -> str:
    name, reason = choose_backend(layer.case, layer.value_BHNd.device)
    return name if reason is None else f"{name}, because {reason}"
