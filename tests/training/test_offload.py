"""An optimizer that is offloaded needs DeepSpeed's extension, and goes by the number of a step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from refiner_ds.errors import ConfigError
from refiner_ds.training.cpu_adamw import cpu_adamw

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def test_where_the_extension_does_not_compile_a_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(
        ConfigError, match="^zero_optimization.offload_optimizer: .* install a C\\+\\+ compiler"
    ) as refusal:
        cpu_adamw([{"params": [nn.Parameter()]}], SETTINGS)
    assert "\n" not in str(refusal.value)
