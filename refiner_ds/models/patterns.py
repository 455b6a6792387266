"""Parts of a model by name, prefix or shell pattern: "pos_embed", "patch_embed", "blocks.[0-3]"."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["matching"]


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that are meant by at least one pattern.

    Raises:
        ValueError: a pattern means none of them, or they are no list of words.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(f"names of parameters are {patterns!r}; they must be a list, such as ['patch_embed']")
    names, found = list(names), set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{pattern!r} names no parameter; it must be a name, a prefix or a pattern of either")
        meant = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not meant:
            raise ValueError(f"{pattern} names no parameter; names begin with patch_embed, blocks.0, norm, head …")
        found |= meant
    return found
