"""Which modules of a transformers model are self-attention that can be refined, and why a model's cannot be."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from refiner_ds.errors import ConfigError

__all__ = ["SUCH_AS", "attention_layers", "heads_of", "refuse_causal"]

SUCH_AS = "such as BERT, RoBERTa, DistilBERT or ViT"


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Self-attention modules by name: those whose forward asks transformers' AttentionInterface what to compute.

    Raises:
        ConfigError: the model is no encoder of transformers, is causal, or computes attention in code of its own.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{type(model).__name__} is no model of transformers; it must be an encoder, {SUCH_AS}")
    name = type(model).__name__
    refuse_causal(model)
    found = {path: module for path, module in model.named_modules() if _asks_the_interface(module)}
    if not found:
        raise ConfigError(
            f"{name} computes attention in code of its own, not through transformers' AttentionInterface, so there is"
            f" nothing to refine; take an encoder {SUCH_AS}"
        )
    if any(getattr(module, "num_key_value_groups", 1) > 1 for module in found.values()):
        raise ConfigError(f"{name} shares keys among heads; a refiner needs a key a head; take an encoder {SUCH_AS}")
    return found


def refuse_causal(model: nn.Module) -> None:
    """Raise ConfigError where tokens do not see all others: in decoders, and in what has one."""
    config: Any = model.config
    causal = any(getattr(module, "is_causal", False) for module in model.modules() if _asks_the_interface(module))
    if causal or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(model).__name__} is causal, and a refiner cannot be: it convolves maps along queries and keys, so"
            f" that a token would see later ones; refine an encoder, {SUCH_AS}"
        )


def heads_of(model: nn.Module) -> int:
    """Attention heads of each layer.

    Raises:
        ConfigError: the model's layers have no number of heads in common.
    """
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ConfigError(
            f"{type(model).__name__} is no one encoder: its config says no number of heads that all layers have; take"
            f" an encoder {SUCH_AS}"
        )
    return heads


def _asks_the_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
