"""From a file and overrides to a checked run: read, extend, override, validate, resolve.

    ds_configs/mine.json ─ extends ─▶ ds_configs/refiner_s.json        --set refiner.recipe.epochs=10
            └────────────── merged, later layers win ──────────────────────────┘ ─▶ RunFile

Each layer remembers where it came from, so that a refusal can name the file that is wrong.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from refiner_ds.config.addresses import is_address, redacted
from refiner_ds.config.batch import BatchSplit, split_batch
from refiner_ds.config.run_file_keys import INSTEAD, RunFileKeys
from refiner_ds.config.schema import RefinerKeys, Section
from refiner_ds.config.sections import key_paths, section_in
from refiner_ds.config.wording import type_in_words
from refiner_ds.errors import ConfigError
from refiner_ds.shipped import RUN_FILES, or_shipped

QUICKSTART = RUN_FILES / "quickstart.json"


DATA_PLACES = ("train", "maps", "val")  # keys of refiner.data that name a folder or an address


class Layer(NamedTuple):
    """One source of keys: a file, or one ``--set``."""

    name: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class RunFile:
    """A checked run file."""

    path: Path
    keys: RunFileKeys

    @property
    def refiner(self) -> RefinerKeys:
        """The project's own keys."""
        return self.keys.refiner

    @property
    def folder(self) -> Path:
        """The run folder, <output>/<name>, absolute."""
        return Path(self.refiner.run.output) / (self.refiner.run.name or self.path.stem)

    def batch(self, world_size: int) -> BatchSplit:
        """Batch arithmetic for so many processes. Raises ConfigError where it does not divide."""
        try:
            return split_batch(self.keys.train_batch_size, self.keys.train_micro_batch_size_per_gpu, world_size)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def resolved(self) -> dict[str, Any]:
        """What ``config.json`` holds: ours with every default spelled out, DeepSpeed's keys as they were given.

        Addresses of data are without the passwords and query strings in them (`addresses.redacted`).
        """
        given = self.keys.model_dump(mode="json", exclude_unset=True)
        full = self.refiner.model_dump(mode="json")
        full["run"]["name"] = self.folder.name
        for key in DATA_PLACES:
            if full["data"][key] is not None:
                full["data"][key] = redacted(full["data"][key])
        return {**given, "refiner": full, "train_batch_size": self.keys.train_batch_size}


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> RunFile:
    """Read a run file, what it extends, and ``--set key=value`` overrides.

    Args:
        path: the JSON file; None: ``ds_configs/quickstart.json``. ``ds_configs/…`` is one of the package's own run
            files where no such file exists; so it is after ``extends``.
        overrides: ``dotted.key=value``; a value is JSON where it parses as JSON, else a string.
    Raises:
        ConfigError: anything wrong, in one sentence that names file and key.
    """
    file = or_shipped(Path(path), Path(path)) if path is not None else QUICKSTART
    layers = _file_layers(file, ()) + [_override_layer(text) for text in overrides or []]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer.keys)
    merged.pop("extends", None)
    _refuse_unknown(RunFileKeys, merged, (), layers)
    try:
        keys = RunFileKeys.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error, layers)) from None
    return RunFile(file, _with_absolute_paths(keys))


def _file_layers(file: Path, below: tuple[Path, ...]) -> list[Layer]:
    real = file.resolve()
    if real in below:
        raise ConfigError(f"{below[-1]}: extends goes in a circle back to {file}; let one of them stand alone")
    try:
        keys = json.loads(file.read_text(), object_pairs_hook=lambda pairs: _unique(pairs, file))
    except FileNotFoundError:
        asked = f"{below[-1]}: extends {file}, which does not exist" if below else f"{file}: no such run file"
        raise ConfigError(f"{asked}{_near_file(file)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: line {error.lineno} is not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a run file: {error}") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"{file}: holds {_shown(keys)}; a run file is one JSON object")
    parent = keys.get("extends")
    if parent is None:
        return [Layer(str(file), keys)]
    if not isinstance(parent, str):
        raise ConfigError(f"{file}: extends is {_shown(parent)}; it must be the path of a run file")
    return [*_file_layers(or_shipped(file.parent / parent, Path(parent)), (*below, real)), Layer(str(file), keys)]


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    # JSON lets a key stand twice and keeps the last: the reader of the file sees the first.
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f"{file}: {key} stands twice in one object; keep one")
        seen[key] = value
    return seen


def _near_file(file: Path) -> str:
    names = [p.name for p in file.parent.glob("*.json")] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, names, 1)
    return f"; did you mean {file.parent / near[0]}?" if near else ""


def _override_layer(text: str) -> Layer:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip(".").strip():
        raise ConfigError(f"--set {text}: write --set dotted.key=value, e.g. --set refiner.recipe.epochs=10")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    for key in reversed(dotted.split(".")):
        parsed = {key: parsed}
    return Layer(f"--set {redacted(text)}", parsed)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both_objects = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both_objects else value
    return result


def _refuse_unknown(section: type[Section], keys: dict[str, Any], at: tuple[str, ...], layers: list[Layer]) -> None:
    for key, value in keys.items():
        path = (*at, key)
        field = section.model_fields.get(key)
        if field is None:
            said = f"{_source(path, layers)}: {'.'.join(path)} is not a key"
            if not at and key in INSTEAD:
                raise ConfigError(f"{said} here: {INSTEAD[key]}")
            raise ConfigError(f"{said}; {_suggestion(key, section, path)}")
        inner = section_in(field.annotation)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(inner, value, path, layers)


def _suggestion(key: str, section: type[Section], path: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, section.model_fields, 1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = [p for p in key_paths() if p.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    near_anywhere = difflib.get_close_matches(key, [p.rpartition(".")[2] for p in key_paths()], 1, cutoff=0.75)
    if near_anywhere:
        return f"did you mean {next(p for p in key_paths() if p.rpartition('.')[2] == near_anywhere[0])}?"
    where = ".".join(path[:-1]) or "the top level"
    return f"{where} knows {', '.join(sorted(section.model_fields))}"


_ABSENT = object()


def _value_in(layer: Layer, path: tuple[str, ...]) -> Any:
    node: Any = layer.keys
    for key in path:
        node = node.get(key, _ABSENT) if isinstance(node, dict) else _ABSENT
    return node


def _value_at(path: tuple[str, ...], layers: list[Layer]) -> Any:
    """What the last layer that has ``path`` says; ``_ABSENT`` where none does."""
    return next((value for layer in reversed(layers) if (value := _value_in(layer, path)) is not _ABSENT), _ABSENT)


def _source(path: tuple[str, ...], layers: list[Layer]) -> str:
    """The layer that last set ``path``, or the deepest part of it that anything set."""
    for depth in range(len(path), 0, -1):
        for layer in reversed(layers):
            if _value_in(layer, path[:depth]) is not _ABSENT:
                return layer.name
    return next(layer.name for layer in reversed(layers) if not layer.name.startswith("--set"))


WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _sentence(error: ValidationError, layers: list[Layer]) -> str:
    first = error.errors()[0]
    loc = tuple(part for part in first["loc"] if isinstance(part, str) and part in _known_names())
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    if first["type"] == "value_error" and " must " in problem:  # a rule about several keys names its own
        name, _, problem = problem.partition(" ")
        loc = (*loc, *name.split("."))
    key, source, value = ".".join(loc), _source(loc, layers), _value_at(loc, layers)
    if first["type"] == "missing" and value is _ABSENT:
        return f"{source}: {key} is missing; it must be given"
    if value is _ABSENT:  # a default that does not go with what was given
        value = _field(loc).get_default()
    if len(loc) < len(first["loc"]) and isinstance(value, list):
        problem = f"be a {type_in_words(_field(loc).annotation)}"
    elif first["type"] in WORDS:
        problem = f"be {WORDS[first['type']]}"
    return f"{source}: {key} is {_shown(value)}; it must {problem.removeprefix('must ')}"


def _field(loc: tuple[str, ...]) -> FieldInfo:
    section: type[Section] = RunFileKeys
    for part in loc[:-1]:
        section = section_in(section.model_fields[part].annotation) or section
    return section.model_fields[loc[-1]]


def _known_names() -> set[str]:
    return {name for path in key_paths() for name in path.split(".")}


def _shown(value: Any) -> str:
    text = redacted(json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "…"


def _with_absolute_paths(keys: RunFileKeys) -> RunFileKeys:
    """Folders relative to where the command was typed become absolute: the run can be repeated from anywhere."""

    def absolute(folder: str | None) -> str | None:
        if folder is None or folder.startswith("package:") or is_address(folder):
            return folder
        return str(Path(folder).expanduser().absolute())

    data, run, model = keys.refiner.data, keys.refiner.run, keys.refiner.model
    for key, place in (("data.cache", data.cache), ("run.output", run.output), ("model.init_from", model.init_from)):
        if place is not None and is_address(place):
            raise ConfigError(f"refiner.{key} is {_shown(place)}; it must be on a disk, not an address")
    data = data.model_copy(update={name: absolute(getattr(data, name)) for name in (*DATA_PLACES, "cache")})
    run = run.model_copy(update={"output": absolute(run.output)})
    model = model.model_copy(update={"init_from": absolute(model.init_from)})
    return keys.model_copy(
        update={"refiner": keys.refiner.model_copy(update={"data": data, "run": run, "model": model})}
    )
