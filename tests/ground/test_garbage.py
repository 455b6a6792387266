"""When Python looks for garbage."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refiner_ds import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_looked_for_during_an_import_and_then_as_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with garbage.paused():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_what_an_import_made_is_left_out_of_later_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_a_thousand.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_a_thousand", raising=False)
    before = gc.get_freeze_count()
    with garbage.paused():
        importlib.import_module("made_a_thousand")
    assert gc.get_freeze_count() >= before + 1000


def test_garbage_of_other_work_is_still_found(tmp_path: Path) -> None:
    before = gc.get_freeze_count()
    with garbage.paused():
        pass  # everything was imported already
    assert gc.get_freeze_count() <= before
