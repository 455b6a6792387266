"""What the planner counts on fake tensors is what real tensors take."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention.live_bytes import LiveBytes
from tests.plan.counting import counted, planned, run_file

CASES = [
    ("eager", "none", "activations", ()),
    ("tiled", "none", "activations", ()),
    ("tiled", "none", "map", ()),
    ("tiled", "pair", "map", ()),
    ("tiled", "refiner", "activations", ()),
    ("tiled", "pair", "activations", ("refiner.model.cos_reg=0",)),
]


@pytest.mark.parametrize(("backend", "checkpointing", "save", "more"), CASES)
def test_activations_are_planned_to_the_byte(
    backend: str, checkpointing: str, save: str, more: tuple[str, ...]
) -> None:
    run = run_file("refiner_vit_s", 64, checkpointing, save, "refiner.model.depth=4", *more)
    real = counted(run, 2, backend)
    assert sum(planned(run, 2, backend).saved.values()) == real.saved


@pytest.mark.parametrize("checkpointing", ["none", "pair"])
def test_the_peak_is_planned_within_5_percent(checkpointing: str) -> None:
    """With enough tokens that activations and not one weight's gradient are the most."""
    run = run_file("refiner_vit_s", 160, checkpointing, "activations")
    real = counted(run, 2, "tiled")
    assert planned(run, 2, "tiled").peak == pytest.approx(real.peak, rel=0.05)


@pytest.mark.parametrize("backend", ["eager", "tiled", "triton"])
def test_every_backend_of_a_gpu_is_planned_in_bf16(backend: str) -> None:
    from refiner_ds.plan.trace import trace

    run = run_file("refiner_vit_l", 448, "none", "map", "refiner.model.depth=4")
    small, large = (trace(run, 1000, images, True, backend, 80 << 30) for images in (1, 2))
    assert 1.8 < sum(large.saved.values()) / sum(small.saved.values()) < 2.01
    assert small.peak > sum(small.saved.values()) > 0
    assert any(one.backward for one in small.operations)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_recomputed_block_leaves_nothing_behind(backend: str) -> None:
    """The peak grows with depth by what blocks save, and not by the maps that recomputing them makes."""
    from refiner_ds.plan.trace import trace

    runs = (run_file("refiner_vit_s", 384, "pair", "map", f"refiner.model.depth={depth}") for depth in (6, 12))
    few, many = (trace(run, 1000, 2, True, backend, 80 << 30) for run in runs)
    assert many.peak - few.peak == pytest.approx(sum(many.saved.values()) - sum(few.saved.values()), rel=0.05)


def test_only_what_is_read_and_written_counts_as_bytes_moved() -> None:
    """A lower bound of a step's time must not hold what a tensor is only asked, or looked at in another shape."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), LiveBytes(gpu=True) as live:
        x = torch.empty(4, 6)
        assert x.device.type == "cpu"
        torch.ops.prim.device(x)
        torch.ops.aten._unsafe_view(x.view(6, 4).t().detach(), [4, 6])
        assert live.operations == []
        y = x + 1
        y.add_(x)
        x.clone()
        weights = torch.empty(2, 6)
        weights @ x.t()
    moved = [(one.flops, one.bytes // 4) for one in live.operations]
    assert moved == [(0, 24 + 24), (0, 24 + 24 + 24), (0, 24 + 24), (2 * 2 * 6 * 4, 12 + 24 + 8)]
