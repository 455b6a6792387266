"""Refiners in the layers of a transformers model: added to one that exists, or while transformers builds one.

    add_refiner(model)                                              a model that exists
    AutoModel.from_pretrained(place, attn_implementation="refiner") one that is built: `register_building`
    AutoModel.from_pretrained(folder of a refined model)            likewise: its config.json says ``refiner``

A layer's refiner is its attribute ``refiner``, so its weights are saved, loaded and trained with the layer's own.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from refiner_ds.errors import ConfigError
from refiner_ds.text.encoders import attention_layers, heads_of
from refiner_ds.text.interface import NAME
from refiner_ds.text.loaded import refuse_other_refiners
from refiner_ds.text.options import RefinerOptions
from refiner_ds.text.refiners import TextRefiner, build_refiner

__all__ = ["add_refiner", "register_building"]


def add_refiner(
    model: PreTrainedModel,
    kind: str = "linear",
    expansion_ratio: float = 3,
    kernel_size: int = 3,
    init: str | None = None,
) -> PreTrainedModel:
    """Give every layer of an encoder a refiner, and let its attention use it.

    Args:
        model: BERT, RoBERTa, DistilBERT, ViT, or another encoder whose attention goes through AttentionInterface.
        kind, expansion_ratio, kernel_size, init: see :class:`RefinerOptions`.
    Returns:
        The model itself. ``save_pretrained`` keeps the options in its config and the weights with the others.
    Raises:
        ConfigError: the model is no such encoder, has refiners already, or the options do not suit it.
    """
    options = RefinerOptions(kind, expansion_ratio, kernel_size, init)
    if any(hasattr(layer, "refiner") for layer in attention_layers(model).values()):
        raise ConfigError(f"{type(model).__name__} has refiners already; take a plain model")
    for layer in _attach(model, options):
        like = next(parameter for name, parameter in layer.named_parameters() if not name.startswith("refiner."))
        layer.refiner.to(like.device, like.dtype).train(layer.training)
    model.set_attn_implementation(NAME)
    return model


def _attach(model: nn.Module, options: RefinerOptions) -> list[Any]:
    """Refiners for the layers that have none yet; returns those layers."""
    bare: list[Any] = [layer for layer in attention_layers(model).values() if not hasattr(layer, "refiner")]
    config: Any = model.config
    if getattr(config, "output_attentions", False):
        raise ConfigError(
            f"{type(model).__name__}: its config says output_attentions, which transformers takes with eager attention"
            " alone; ask for refined maps in a call, model(..., output_attentions=True)"
        )
    for layer in bare:
        layer.refiner = build_refiner(heads_of(model), options)
    config.refiner = options.as_keys()
    return bare


def _options_of(model: nn.Module) -> RefinerOptions | None:
    """What the config of a model under construction says; ``None`` where it is a plain one."""
    config: Any = model.config
    keys = getattr(config, "refiner", None)
    if keys is None and config._attn_implementation != NAME:
        return None
    return RefinerOptions.read(keys or {})


def register_building() -> None:
    """Let transformers add, initialise and load refiners itself, by three methods that every model of its inherits."""
    if hasattr(PreTrainedModel.post_init, "__wrapped__"):
        return
    end_of_init, initialise = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    end_of_loading = PreTrainedModel._finalize_model_loading

    @wraps(end_of_init)
    def post_init(self: Any) -> None:
        if (options := _options_of(self)) is not None:
            _attach(self, options)
            self.config._attn_implementation = NAME
        end_of_init(self)

    @wraps(initialise)
    def _initialize_weights(self: Any, module: Any, *arguments: Any, **named: Any) -> None:
        if isinstance(module, TextRefiner) and not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
        initialise(self, module, *arguments, **named)

    @wraps(end_of_loading)
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        place = load_config.pretrained_model_name_or_path
        refuse_other_refiners(model, place, loading_info, load_config.ignore_mismatched_sizes)
        return end_of_loading(model, load_config, loading_info)

    PreTrainedModel.post_init, PreTrainedModel._initialize_weights = post_init, _initialize_weights
    PreTrainedModel._finalize_model_loading = staticmethod(_finalize_model_loading)
