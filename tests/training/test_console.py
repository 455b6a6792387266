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
        shown.progress(step, step - 900, {"step": str(step)}, logged=True)
        lines.append(capsys.readouterr().out.strip())
    assert lines == ["step 901  left …", "step 902  left 3:16", "step 911  left 2:58"]
