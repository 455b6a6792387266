"""From a run file to a model, and to what a person wants to know of it before a month of GPU time."""

from __future__ import annotations

import difflib
import os

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from refiner_ds.attention import attention_backend, resolve_backend, set_save_for_backward
from refiner_ds.config import RunFile
from refiner_ds.errors import ConfigError
from refiner_ds.models import RefinedViT, SyncBatchNorm  # importing them registers the names with timm

# The run file's words for what timm's models take; every other key of refiner.model has the same name there.
NOT_OPTIONS = {
    "name", "attention", "save_for_backward", "checkpointing", "compile", "init_from", "init_layers",
    "reset_head", "freeze", "sync_batch_norm",
}  # fmt: skip
TIMM_NAMES = {"drop_path": "drop_path_rate", "drop": "proj_drop_rate", "attn_drop": "attn_drop_rate"}


def choose_attention(run: RunFile, device: torch.device) -> None:
    """Let this process compute refined attention as the run file says; $REFINER_ATTENTION has the last word.

    Raises:
        ConfigError: there is no such backend, or it does not run on this device.
    """
    keys = run.refiner.model
    if keys.attention not in (None, "auto"):
        os.environ.setdefault("REFINER_ATTENTION", keys.attention)
    try:
        resolve_backend(device=device)
    except ValueError as refusal:
        raise ConfigError(str(refusal)) from None
    set_save_for_backward(keys.save_for_backward)


def build_model(run: RunFile, num_classes: int) -> RefinedViT:
    """The run file's model with fresh weights on the current default device.

    Args:
        num_classes: used where ``refiner.model.num_classes`` is null.
    Raises:
        ConfigError: no such model, or options that it does not take.
    """
    keys = run.refiner.model
    if not timm.is_model(keys.name):
        near = difflib.get_close_matches(keys.name, timm.list_models("refine*") + timm.list_models(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(timm.list_models('refine*'))}"
        raise ConfigError(f"{run.path}: refiner.model.name {keys.name} does not exist; {hint}")
    options = {
        TIMM_NAMES.get(key, key): value
        for key, value in keys.model_dump(exclude=NOT_OPTIONS).items()
        if value is not None and not (isinstance(value, float) and value == 0)
    }
    options["num_classes"] = keys.num_classes or num_classes
    try:
        model = timm.create_model(keys.name, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{run.path}: refiner.model: {error}") from None
    if not isinstance(model, RefinedViT):
        raise ConfigError(
            f"{run.path}: refiner.model.name {keys.name} has no patch head to train on token labels;"
            ' for a plain ViT take refined_vit with "refiner": "none"'
        )
    if keys.sync_batch_norm:
        SyncBatchNorm.convert(model)
    try:
        model.freeze(keys.freeze)
    except ValueError as error:
        raise ConfigError(f"{run.path}: refiner.model.freeze: {error}") from None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{run.path}: refiner.model.freeze leaves nothing to train; name parts of the model")
    return model


def set_recompute(run: RunFile, model: RefinedViT) -> None:
    """Let backward recompute what ``refiner.model.checkpointing`` names, by DeepSpeed's means where those are asked."""
    unit = run.refiner.model.checkpointing
    if unit == "none":
        return
    checkpoint = None
    if run.keys.activation_checkpointing is not None:
        from deepspeed import checkpointing

        checkpoint = checkpointing.checkpoint
    model.set_grad_checkpointing(True, unit=unit, checkpoint=checkpoint)


def parameter_count(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def training_flops(run: RunFile, num_classes: int) -> int:
    """Floating-point operations of one image's forward and backward (twice the forward's), counted on shapes alone.

    Those of the plain composition, whichever backend computes them: recomputed operations are not useful work.
    """
    with attention_backend("eager"), torch.device("meta"):
        model = build_model(run, num_classes).train()
        side = run.refiner.model.img_size
        # Two images and halving: batch norms and mix-token want more than one.
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, side, side))
    return 3 * counter.get_total_flops() // 2
