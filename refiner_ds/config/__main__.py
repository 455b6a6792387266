"""``python -m refiner_ds.config``: the table of keys, in Markdown, from the schema itself."""

from __future__ import annotations

from pydantic import BaseModel

from refiner_ds.config.deepspeed_keys import RunFileKeys
from refiner_ds.config.reading import section_in
from refiner_ds.config.wording import in_json, written


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
        default = "required" if field.is_required() else f"`{in_json(field.default)}`"
        rows.append(f"| `{key}` | {written(field.annotation)} | {default} | {field.description} |")
    head = [
        f"## `{title}`" if at else f"## {title}",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    table = "\n".join([*head, *rows]) + "\n\n" if rows else ""
    return table + "".join(key_table(model, path) for path, model in inner)


if __name__ == "__main__":
    print("# Keys of a run file\n\nPrinted by `python -m refiner_ds.config`.\n")
    print(key_table().rstrip())
