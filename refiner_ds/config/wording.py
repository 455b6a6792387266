"""Types and values in the words of someone who writes JSON."""

from __future__ import annotations

import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def type_in_words(annotation: Any) -> str:
    """A type annotation: ``float | None`` is "number or null"."""
    if get_origin(annotation) is Annotated:
        return type_in_words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(as_json(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(type_in_words(part) for part in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        count = f"{len(parts)} " if get_origin(annotation) is tuple else ""
        return f"list of {count}{type_in_words(parts[0])}s"
    words = {int: "whole number", float: "number", str: "string", bool: "true or false", type(None): "null"}
    return words[annotation]


def as_json(value: Any) -> str:
    """A value as it stands in a run file."""
    return json.dumps(value, ensure_ascii=False)
