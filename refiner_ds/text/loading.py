"""Models and tokenizers of a run file: built, or loaded and refined; what does not fit is refused before training."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.text.encoders import refuse_causal
from refiner_ds.text.interface import NAME
from refiner_ds.text.options import RefinerOptions
from refiner_ds.text.run_file import TextRun

__all__ = ["load_model", "load_tokenizer", "tokenizer_at"]


def load_tokenizer(run: TextRun) -> Any:
    """The run's tokenizer: the one it names, or its model's.

    Raises:
        ConfigError: none is named.
        CheckpointError: there is none at that place.
    """
    place = run.tokenizer if run.tokenizer is not None else run.model
    if not isinstance(place, str):
        raise ConfigError(f"{run.path}: text.tokenizer must be a folder or a name on the hub")
    return tokenizer_at(place)


def tokenizer_at(place: str) -> Any:
    """The tokenizer of a folder or a name on the hub. Raises CheckpointError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place}: holds no tokenizer of transformers ({_first_line(error)})") from None


def load_model(run: TextRun, auto: Any, tokenizer: Any, **config_keys: Any) -> Any:
    """The run's model, with refiners where it asks for them.

    Args:
        run: the run file.
        auto: one of transformers' Auto classes.
        tokenizer: gives a new model its vocabulary.
        config_keys: of the config, such as num_labels.
    Raises:
        ConfigError: the model is no encoder, or cannot be built or refined.
        CheckpointError: it cannot be loaded, or has refiners of other options than the run's.
    """
    config = _config_of(run, tokenizer, config_keys)
    _join_refiners(run, config)
    implementation = {} if run.refiner is None else {"attn_implementation": NAME}
    try:
        if isinstance(run.model, str):
            model = auto.from_pretrained(run.model, config=config, **implementation)
        else:
            model = auto.from_config(config, **implementation)
    except ConfigError as error:
        raise ConfigError(f"{run.path}: {error}") from None
    except (OSError, RuntimeError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(
                f"{run.path}: {config.model_type} is no encoder of text; take one such as BERT, RoBERTa or DistilBERT"
            ) from None
        raise CheckpointError(f"{run.model}: cannot be loaded: {_first_line(error)}") from None
    try:
        refuse_causal(model)
    except ConfigError as error:
        raise ConfigError(f"{run.path}: {error}") from None
    return model


def _config_of(run: TextRun, tokenizer: Any, keys: dict[str, Any]) -> Any:
    try:
        if isinstance(run.model, str):
            return AutoConfig.from_pretrained(run.model, **keys)
        own = {name: value for name, value in run.model.items() if name != "model_type"}
        words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return AutoConfig.for_model(run.model.get("model_type", ""), **{**words, **own, **keys})
    except (OSError, ValueError, TypeError) as error:
        if isinstance(run.model, str):
            raise CheckpointError(f"{run.model}: holds no model of transformers ({_first_line(error)})") from None
        raise ConfigError(f"{run.path}: text.model cannot be built: {_first_line(error)}") from None


def _join_refiners(run: TextRun, config: Any) -> None:
    """Give a config the run's refiners; refuse a checkpoint that has others, or has any where the run has none."""
    saved = getattr(config, "refiner", None)
    if saved is not None:
        there = RefinerOptions.read(saved)
        if run.refiner is None:
            raise CheckpointError(
                f"{run.model}: has refiners, and {run.path} asks for a plain model; add text.refiner, or take a plain"
                " checkpoint"
            )
        for name in ("kind", "expansion_ratio", "kernel_size"):
            if (ours := getattr(run.refiner, name)) != (theirs := getattr(there, name)):
                raise CheckpointError(
                    f"{run.model}: its refiners have {name} {theirs}, and {run.path} asks for {ours}; take {theirs}, or"
                    " a plain checkpoint"
                )
    if run.refiner is not None:
        config.refiner = run.refiner.as_keys()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
