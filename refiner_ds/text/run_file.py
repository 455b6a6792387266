"""Run files of text: a DeepSpeed configuration with a section ``text``, in one JSON file.

    {"text": {"model": …, "refiner": {…}, "training": {…}}, "zero_optimization": {…}, "train_batch_size": "auto", …}

Keys beside ``text`` are DeepSpeed's and go to transformers' Trainer as they are, which fills in "auto"; without any it
trains without DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refiner_ds.errors import ConfigError
from refiner_ds.shipped import or_shipped, read_given
from refiner_ds.text.options import RefinerOptions

__all__ = ["TextRun", "read_run"]


@dataclass(frozen=True)
class TextRun:
    """What a run file says.

    Args:
        path: the file.
        model: a folder or a name on the hub; or the keys of a transformers config with its ``model_type``, for a model
            with new weights.
        tokenizer: a folder or name, where the model's own is not meant; or ``{"vocab_size": …}``, to learn WordPieces
            from the text that is pre-trained on.
        refiner: kind, ratio, kernel and initial values; ``None`` for a plain model.
        max_length: longest sequence, in tokens.
        masked: share of words that pre-training masks.
        training: arguments of transformers' TrainingArguments.
        deepspeed: DeepSpeed's keys.
    """

    path: Path
    model: str | dict[str, Any]
    tokenizer: str | dict[str, Any] | None = None
    refiner: RefinerOptions | None = None
    max_length: int = 128
    masked: float = 0.15
    training: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)


def read_run(path: str | Path) -> TextRun:
    """Read a run file; ``ds_configs/…`` is one of the package's where the working folder has none of that name.

    Raises:
        ConfigError: it is not there, not JSON, or a key or value cannot be; the sentence names the file.
    """
    file = or_shipped(Path(path), Path(path))
    keys = read_given(file, "run file")
    section = keys.get("text") if isinstance(keys, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: has no section text; it must say text.model at least")
    known = [one.name for one in fields(TextRun) if one.name not in ("path", "deepspeed")]
    _refuse_strangers(file, "text.", section, known)
    if not isinstance(section.get("model"), str | dict):
        raise ConfigError(f"{file}: text.model must be a folder, a name on the hub, or a config with a model_type")
    _check_numbers(file, section)
    deepspeed = {name: value for name, value in keys.items() if name not in ("text", "about")}
    try:
        refiner = section.get("refiner")
        options = None if refiner is None else RefinerOptions.read(refiner)
    except ConfigError as error:
        raise ConfigError(f"{file}: text.{error}") from None
    return TextRun(file, **{**section, "refiner": options}, deepspeed=deepspeed)


def _check_numbers(file: Path, section: dict[str, Any]) -> None:
    length, masked, training = (section.get(x, y) for x, y in (("max_length", 128), ("masked", 0.15), ("training", {})))
    if not isinstance(length, int) or isinstance(length, bool) or length < 4:
        raise ConfigError(f"{file}: text.max_length is {length!r}; it must be a whole number of at least 4")
    if not isinstance(masked, int | float) or isinstance(masked, bool) or not 0 < masked < 1:
        raise ConfigError(f"{file}: text.masked is {masked!r}; it must be a number between 0 and 1")
    if not isinstance(training, dict):
        raise ConfigError(f"{file}: text.training must hold arguments of transformers' TrainingArguments")


def _refuse_strangers(file: Path, place: str, keys: dict[str, Any], known: Iterable[str]) -> None:
    for name in keys.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        right = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"{file}: {place}{name} is not a key; {right}")


def refuse_unknown_arguments(run: TextRun, known: Iterable[str]) -> None:
    """Refuse keys of ``training`` that TrainingArguments does not take."""
    _refuse_strangers(run.path, "text.training.", run.training, list(known))
