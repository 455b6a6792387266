"""Tests of the extra "text" need transformers; where it is not installed they are skipped and say so."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched

try:
    import transformers
except ImportError:
    transformers = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, rather than fail to import, without transformers."""
    for item in items:
        if transformers is None and "tests/text/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="transformers is not installed"))
