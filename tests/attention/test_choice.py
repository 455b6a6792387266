"""Fused can be asked for where kernels run, and is refused in one sentence where they do not."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.config import load
from refiner_ds.errors import ConfigError
from refiner_ds.training.build import choose_attention

launching = pytest.importorskip("refiner_ds.attention.fused.launching", exc_type=ImportError)

REFUSAL = "^REFINER_ATTENTION is 'triton', which needs Triton and a GPU; on cpu it must be tiled or eager$"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)


def test_a_backend_that_the_device_cannot_run_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=REFUSAL):
        attention.resolve_backend("triton", CPU)
    run = load(None, [f"refiner.run.output={tmp_path}", "refiner.model.attention=triton"])
    monkeypatch.setenv("REFINER_ATTENTION", "tiled")
    choose_attention(run, CPU)  # the environment has the last word
    monkeypatch.setenv("REFINER_ATTENTION", "triton")
    with pytest.raises(ConfigError, match=REFUSAL):
        choose_attention(run, CPU)


def test_a_forced_backend_holds_inside_the_context_and_not_after(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", True)
    with attention.attention_backend("triton"):
        assert attention.resolve_backend() == "triton"
        with attention.attention_backend("eager"):
            assert attention.resolve_backend() == "eager"
        assert attention.resolve_backend() == "triton"
    assert attention.resolve_backend() == "tiled"
