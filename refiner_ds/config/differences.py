"""In which keys two resolved run files differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def changes(before: Any, now: Any, at: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted paths of the keys that differ between two resolved run files, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield at, [before, now]
        return
    for key in [*before, *(key for key in now if key not in before)]:
        yield from changes(before.get(key), now.get(key), f"{at}.{key}" if at else key)
