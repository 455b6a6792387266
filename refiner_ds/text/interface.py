"""What transformers calls where a model's attention implementation is "refiner".

    2-D padding mask ── refiner_mask ──> mask [B, N] or None ── refiner_attention ──> the layer's refiner

Both are registered: without a mask function of its own an implementation is given no mask at all, and silently attends
to padding.
Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from refiner_ds.attention import is_traced
from refiner_ds.errors import ConfigError

__all__ = ["NAME", "refiner_attention", "refiner_mask", "register_interface"]

NAME = "refiner"


def refiner_mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    mask_function: Any = bidirectional_mask_function,
    allow_is_bidirectional_skip: bool = False,
    **unused: Any,
) -> Tensor | None:
    """Which tokens are real, [B, N] bool, or ``None`` where all are.

    Raises:
        ConfigError: the model masks more than padding.
    """
    if attention_mask is not None and (attention_mask.dim() != 2 or q_length != kv_length):
        raise _no_padding_mask(attention_mask, q_length)
    if mask_function is not bidirectional_mask_function or q_length != kv_length:
        raise ConfigError(
            "a refiner takes masks of padding alone, and this model masks more (later tokens, distant ones, or another"
            " sequence's); take an encoder whose tokens see all others"
        )
    if attention_mask is None or (not is_traced() and bool(attention_mask.all())):
        return None
    return attention_mask.to(torch.bool)


def refiner_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Refined attention in the form transformers asks for.

    Args:
        module: the layer, whose attribute ``refiner`` was added by ``add_refiner`` or by transformers itself.
        query, key, value: [B, H, N, d].
        attention_mask: what :func:`refiner_mask` made.
        scaling, dropout: of the logits, and on the maps.
        kwargs: what else a model passes; ``output_attentions`` asks for the maps.
    Returns:
        [B, N, H, d], and the refined maps [B, H, N, N] where they are asked for.
    Raises:
        ConfigError: the layer has no refiner, or needs what refiners do not do.
    """
    refiner = getattr(module, "refiner", None)
    if refiner is None:
        raise ConfigError(f"{type(module).__name__} has no refiner; call refiner_ds.text.add_refiner(model)")
    if key.shape != query.shape or kwargs.get("position_bias") is not None or kwargs.get("is_causal"):
        raise ConfigError(
            f"{type(module).__name__} needs attention to another sequence, a position bias or a causal mask, which a"
            " refiner does not do; take an encoder such as BERT, RoBERTa, DistilBERT or ViT"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _no_padding_mask(attention_mask, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHNd = refiner(query, key, value, attention_mask, scale, dropout)
    maps_BHNN = None
    if kwargs.get("output_attentions"):
        maps_BHNN = refiner.refined_map(query, key, attention_mask, scale)
    return out_BHNd.transpose(1, 2).contiguous(), maps_BHNN


def _no_padding_mask(attention_mask: Tensor, tokens: int) -> ConfigError:
    shape = list(attention_mask.shape)
    return ConfigError(
        f"attention_mask has shape {shape}; a refiner takes masks of padding, [batch, tokens], here of {tokens} tokens,"
        " and models that hand such a mask to their layers"
    )


def register_interface() -> None:
    """Make ``attn_implementation="refiner"`` known to transformers."""
    AttentionInterface.register(NAME, refiner_attention)
    AttentionMaskInterface.register(NAME, refiner_mask)
