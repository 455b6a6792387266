"""Every Python snippet of docs/models.md runs, in order, and prints what the page says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 7
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in snippets:
            exec(compile(snippet, str(PAGE), "exec"), names)
    assert "heads start afresh: the checkpoint has 1000 classes and the model 100\n" in text
    assert "heads start afresh: the checkpoint has 1000 classes and the model 100\n" in capsys.readouterr().out
    assert [tuple(feature.shape) for feature in names["features"]] == [(2, 384, 14, 14)] * 2
    assert names["class_logits"].shape == (2, 1000) and names["patch_logits"].shape == (2, 196, 1000)
