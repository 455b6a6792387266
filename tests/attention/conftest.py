"""What this CPU can multiply decides nothing in these tests: they force it either way."""

from __future__ import annotations

import pytest

from refiner_ds.attention.tiling import ops


@pytest.fixture(params=[True, False], ids=["bf16 products", "fp32 products"])
def bf16_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both answers to whether the CPU multiplies bfloat16; PyTorch emulates what it cannot do."""
    monkeypatch.setattr(ops, "cpu_multiplies_bf16", lambda: request.param)
    return request.param
