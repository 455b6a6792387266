"""Tiny encoders of transformers with random weights, and ragged batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

HEADS, WIDTH, LAYERS, WORDS, LENGTHS = 3, 24, 2, 60, (9, 4, 6)
KEYS = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32,
    "vocab_size": WORDS, "max_position_embeddings": 40,
}  # fmt: skip
DISTIL = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32, "vocab_size": WORDS}
VIT = {"image_size": 12, "patch_size": 4, "num_channels": 1, **KEYS}
CONFIGS: dict[str, dict[str, Any]] = {"bert": KEYS, "roberta": KEYS, "distilbert": DISTIL, "vit": VIT}


def config_of(kind: str, **more: Any) -> Any:
    return AutoConfig.for_model(kind, **{**CONFIGS[kind], **more})


def encoder(kind: str, auto: Any = AutoModel, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model in evaluation mode, drawn from the current seed."""
    attn = {name: more.pop(name) for name in ("attn_implementation",) if name in more}
    return auto.from_config(config_of(kind, **more), **attn).eval().to(dtype)


def move_weights(model: torch.nn.Module, by: float = 0.1) -> None:
    """Leave initial values, an identity's most of all."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn_like(weight))


def padded() -> tuple[Tensor, Tensor]:
    """Word numbers and which of them are real, [B, N] and [B, N]."""
    words = torch.randint(5, WORDS, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return words.masked_fill(~mask, 1), mask


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is called with, and which of its output's tokens are real."""
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 1, 12, 12, dtype=dtype)}, torch.ones(2, 10, dtype=torch.bool)
    words, mask = padded()
    return {"input_ids": words, "attention_mask": mask.long()}, mask


def tokens_of(model: Any, given: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The encoder's output for real tokens."""
    return model(**given).last_hidden_state[mask]
