"""The page that adds a refiner does what it says: weights, equations and a row are enough."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from refiner_ds.attention import dispatch, equations, refiners

PAGE = Path(__file__).parents[2] / "docs" / "developing.md"


def test_the_refiner_of_the_page_runs_under_every_backend_and_is_logged(monkeypatch, caplog):
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text[text.index("## Adding a refiner") :], re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.setattr(refiners, "REFINERS", dict(refiners.REFINERS))
    monkeypatch.setattr("refiner_ds.attention.REFINERS", refiners.REFINERS)
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    names: dict = {}
    with caplog.at_level(logging.INFO):
        for snippet in snippets:
            exec(compile(snippet, str(PAGE), "exec"), names)
    (line,) = caplog.messages
    assert line in " ".join(text.split())
    attn, value, mix = (x.detach().clone().requires_grad_() for x in (names["attn"], names["value"], *names["weights"]))
    truth = equations.attend(torch.einsum("oh,bhqk->boqk", mix, attn), value)
    torch.testing.assert_close(names["out"], truth)
    truth.square().sum().backward()
    for ours, theirs in zip((names["attn"], names["value"], *names["weights"]), (attn, value, mix), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
