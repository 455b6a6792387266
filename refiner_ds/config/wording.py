"""Types and values in the words of someone who writes JSON."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def written(annotation: Any) -> str:
    """A type annotation: ``float | None`` is "number or null"."""
    if get_origin(annotation) is Annotated:
        return written(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(in_json(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(written(part) for part in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        count = f"{len(parts)} " if get_origin(annotation) is tuple else ""
        return f"list of {count}{written(parts[0])}s"
    return {int: "whole number", float: "number", str: "string", bool: "true/false", type(None): "null"}[annotation]


def in_json(value: Any) -> str:
    """A value as it would stand in a run file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return f"[{', '.join(in_json(part) for part in value)}]"
    return {None: "null", True: "true", False: "false"}.get(value) or (
        f'"{value}"' if isinstance(value, str) else str(value)
    )
