"""Parts of a model by name, prefix or shell pattern: "pos_embed", "patch_embed", "blocks.[0-3]"."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["matching"]


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that are meant by at least one pattern.

    Raises:
        ValueError: a pattern means none of them.
    """
    names, found = list(names), set()
    for pattern in patterns:
        meant = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not meant:
            raise ValueError(f"{pattern} names no parameter; names begin with patch_embed, blocks.0, norm, head …")
        found |= meant
    return found
