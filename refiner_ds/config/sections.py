"""Walking through the schema: the sections inside sections, their keys by dotted path, and what may not change."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from refiner_ds.config.run_file_keys import RunFileKeys
from refiner_ds.config.schema import Section

ABSENT = object()


def section_in(annotation: Any) -> type[Section] | None:
    """The section a key holds, looking through ``Section | None``."""
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(section_in, get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def key_paths(section: type[Section] = RunFileKeys, at: str = "") -> Iterator[str]:
    """Dotted paths of a section's keys, sections included, each before what it holds."""
    for key, field in section.model_fields.items():
        yield at + key
        if inner := section_in(field.annotation):
            yield from key_paths(inner, f"{at}{key}.")


def fixed_keys(section: type[Section] = RunFileKeys, at: str = "") -> Iterator[str]:
    """Dotted paths of the keys that may not change while a run folder is continued."""
    for key, field in section.model_fields.items():
        if key in section.may_change:
            continue
        if inner := section_in(field.annotation):
            yield from fixed_keys(inner, f"{at}{key}.")
        else:
            yield at + key


def forbidden_change(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which two resolved run files differ that may not change while a run folder is continued.

    Returns:
        Its dotted path and both values; None where the one continues the other.
    """
    for key in fixed_keys():
        old, new = _at(before, key), _at(now, key)
        if old is not ABSENT and old != new:  # absent: the key is younger than the run
            return key, old, new
    return None


def _at(keys: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        keys = keys.get(key, ABSENT) if isinstance(keys, dict) else ABSENT
    return keys
