"""``python -m refiner_ds.config``: the table of keys, in Markdown, from the schema itself."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from refiner_ds.config.deepspeed_keys import RunFileKeys
from refiner_ds.config.reading import section_in


def key_table(section: type[BaseModel] = RunFileKeys, at: str = "") -> str:
    """Markdown tables of a section's keys and, after it, of the sections inside it."""
    title = at.rstrip(".") or "Top level"
    rows = []
    inner: list[tuple[str, type[BaseModel]]] = []
    for key, field in section.model_fields.items():
        holds = section_in(field.annotation)
        if holds is not None:
            inner.append((f"{at}{key}.", holds))
            continue
        default = "required" if field.is_required() else f"`{_json(field.default)}`"
        rows.append(f"| `{key}` | {_type(field.annotation)} | {default} | {field.description} |")
    head = [
        f"## `{title}`" if at else f"## {title}",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    table = "\n".join([*head, *rows]) + "\n\n" if rows else ""
    return table + "".join(key_table(model, path) for path, model in inner)


def _json(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return f"[{', '.join(_json(part) for part in value)}]"
    return {None: "null", True: "true", False: "false"}.get(value) or (
        f'"{value}"' if isinstance(value, str) else str(value)
    )


def _type(annotation: Any) -> str:
    """An annotation in the words of someone who writes JSON."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(_json(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        parts = [part for part in get_args(annotation) if part is not Ellipsis]
        count = f"{len(parts)} " if get_origin(annotation) is tuple else ""
        return f"list of {count}{_type(parts[0])}s"
    return {int: "whole number", float: "number", str: "string", bool: "true/false", type(None): "null"}[annotation]


if __name__ == "__main__":
    print("# Keys of a run file\n\nPrinted by `python -m refiner_ds.config`.\n")
    print(key_table().rstrip())
