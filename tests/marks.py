"""Cases of a parametrised test that say more of what the other cases say: ``make test-long`` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def long_where(is_long: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases in their order, those marked ``long`` of which ``is_long(*values)`` holds."""
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=pytest.mark.long) if is_long(*values) else case)
    return marked
