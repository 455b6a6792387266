"""Which backend computes each kind of attention a model has, found out before the first step."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from refiner_ds.attention import Case, DeferredMap, choose_backend, resolve_backend
from refiner_ds.config import RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.models.attention import MapAttention, PlainAttention, RefinedAttention, SharedAttention
from refiner_ds.training.world import World

AnyAttention = MapAttention | PlainAttention | RefinedAttention | SharedAttention


def attention_line(run: RunFile, model: RefinedViT, world: World, dtype: torch.dtype) -> str:
    """ "map: tiled, bottleneck: tiled (tiled is the default on CPUs)".

    Args:
        model: on the meta device; only its shapes matter. It is used up.
        dtype: of the parameters in training.
    """
    device, synchronised = world.device, run.refiner.model.sync_batch_norm and world.size > 1
    cases: dict[str, str] = {}
    for block in model.train().blocks:
        kind, computed = _computed(block.attn, device, dtype, synchronised)
        cases.setdefault(kind, computed)
    said = ", ".join(f"{kind}: {computed}" for kind, computed in cases.items())
    requested = resolve_backend(device=device)
    if os.environ.get("REFINER_ATTENTION"):
        why = "asked for"  # by the run file or in the environment
    else:
        why = f"the default on {'GPUs' if device.type == 'cuda' else 'CPUs'}"
    return f"{said} ({requested} is {why})"


def _computed(attn: torch.nn.Module, device: torch.device, dtype: torch.dtype, synchronised: bool) -> tuple[str, str]:
    """What an attention module is called here, and what computes it."""
    assert isinstance(attn, (MapAttention, PlainAttention, RefinedAttention, SharedAttention))
    if isinstance(attn, PlainAttention) and not attn.passes_map:
        return "attention", "PyTorch's fused kernels"
    q_BHNd, k_BHNd, v_BHNd = _heads(attn, device, dtype)
    deferred = DeferredMap(q_BHNd, k_BHNd, attn.scale, attn.attn_drop)
    if isinstance(attn, (MapAttention, PlainAttention)):
        return "map", _named(Case(deferred, v_BHNd), device)
    kind = "bottleneck" if hasattr(attn, "DLA") else "linear"
    if kind == "bottleneck" and synchronised:
        return kind, "eager, because its batch norms take statistics over ranks"
    attn.to_empty(device=device)
    for parameter in attn.parameters():  # alone: statistics are fp32
        parameter.data = parameter.data.to(dtype)
    if (weights := attn.weights()) is None:
        return kind, "eager, because its layers are called one by one"
    takes_map = isinstance(attn, SharedAttention) or attn.passes_map
    tokens = q_BHNd.shape[2]
    source = q_BHNd.new_zeros(1, attn.num_heads, tokens, tokens) if takes_map else deferred
    return kind, _named(Case(source, v_BHNd, weights), device)


def _heads(attn: AnyAttention, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, grid, scale = attn.num_heads, attn.grid, attn.scale
    shape = (1, heads, 1 + grid[0] * grid[1], round(scale**-2))
    zeros = torch.zeros(shape, device=device, dtype=dtype)
    return zeros, zeros.clone(), zeros.clone()


def _named(case: Case, device: torch.device) -> str:
    name, reason = choose_backend(case, device)
    return name if reason is None else f"{name}, because {reason}"
