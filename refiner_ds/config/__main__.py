"""``python -m refiner_ds.config``: the table of keys, in Markdown, from the schema itself."""

from __future__ import annotations

from refiner_ds.config.run_file_keys import RunFileKeys
from refiner_ds.config.schema import Section
from refiner_ds.config.sections import fixed_keys, section_in
from refiner_ds.config.wording import as_json, type_in_words

HEAD = """# Keys of a run file

Printed by `python -m refiner_ds.config`. Sections outside `refiner` are DeepSpeed's; where a key of theirs is `null`,
DeepSpeed's own default applies. A *fixed* key keeps its value as long as a run folder is resumed; with another value,
start another run (`refiner.run.name`).
"""


def key_table(section: type[Section] = RunFileKeys, at: str = "") -> str:
    """Markdown tables of a section's keys and, after it, of the sections inside it."""
    fixed = set(fixed_keys())
    rows = []
    inner: list[tuple[str, type[Section]]] = []
    for key, field in section.model_fields.items():
        holds = section_in(field.annotation)
        if holds is not None:
            inner.append((f"{at}{key}.", holds))
            continue
        default = "required" if field.is_required() else f"`{as_json(field.default)}`"
        resume = "fixed" if at + key in fixed else "may change"
        kind, meaning = (
            text.replace("|", "\\|") for text in (type_in_words(field.annotation), field.description or "")
        )
        rows.append(f"| `{key}` | {kind} | {default} | {resume} | {meaning} |")
    head = [
        f"## `{at.rstrip('.')}`" if at else "## Top level",
        "",
        "| key | type | default | on resume | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    table = "\n".join([*head, *rows]) + "\n\n" if rows else ""
    return table + "".join(key_table(model, path) for path, model in inner)


if __name__ == "__main__":
    print(HEAD)
    print(key_table().rstrip())
