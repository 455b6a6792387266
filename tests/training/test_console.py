"""What a person reads while a run trains."""

from __future__ import annotations

import pytest

from refiner_ds.training import console
from refiner_ds.training.console import Console


def test_the_time_left_is_that_of_steps_not_of_starting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that resumes near its end has loaded for minutes and trained for seconds."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    shown = Console(True, total_steps=1000)
    lines = []
    for seconds, step in ((600.0, 901), (602.0, 902), (620.0, 911)):
        now = seconds
        shown.count(step - 900)
        shown.progress(step, step - 900, {"step": str(step)}, logged=True)
        lines.append(capsys.readouterr().out.strip())
    assert lines == ["step 901  left …", "step 902  left 3:16", "step 911  left 2:58"]


def test_the_end_is_told_with_day_and_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr(console.time, "time", lambda: 1_764_079_200 + now)  # Tue 25 Nov 2025, 14:00 UTC
    monkeypatch.setattr(console.time, "localtime", console.time.gmtime)
    shown = Console(True, total_steps=1050)
    for seconds, trained in ((100.0, 1), (149.0, 50)):
        now = seconds
        shown.count(trained)
    assert shown.end(50, 50) == "ends in about 16:40, on Tue 25 Nov, 14:19"
