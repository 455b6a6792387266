"""The tiled linear refiner computes what eager does, from maps and from queries and keys."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, LinearWeights
from refiner_ds.attention.linear import tiled as linear_tiled
from refiner_ds.attention.linear.tiled import composing_is_faster, steps_of
from refiner_ds.attention.tiling import tiles
from tests.attention.cases import (
    SCALE,
    SHAPES,
    forward_and_backward,
    leaf,
    leaves,
    linear,
    maps,
    relative_errors,
    scores,
)

# The form of a whole refiner is forced; without expansion or reduction there is but one.
STEPS = {"composed": {}, "in steps": {}, "no reduction": {"reduce": False}, "local alone": {"expand": False}}
FORCED = {"composed": float("inf"), "in steps": 0.0}


@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("source", [maps, scores])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_eager(shape, steps, source, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(linear_tiled, "STEP_COST", FORCED.get(steps))
    batch, heads, tokens, ratio, kernel_size = shape
    attn, value = source(batch, heads, tokens), leaf(batch, heads, tokens, 5)
    refiner = linear(heads, ratio, kernel_size, **STEPS[steps])
    assert (len(leaves(*steps_of(refiner, SCALE))) == 1) == (steps in ("composed", "local alone"))
    maps_out = ratio * heads if steps == "no reduction" else heads
    direction = torch.randn(batch, maps_out, tokens, 5).double()
    truth = forward_and_backward(attn, value, refiner, "eager", direction)
    ours = forward_and_backward(attn, value, refiner, "tiled", direction)
    errors = relative_errors(ours, truth)
    assert max(errors) < 1e-12, errors


@pytest.mark.parametrize(
    ("heads", "ratio", "kernel_size", "pays"),
    [(12, 1, 3, False), (12, 2, 3, True), (12, 3, 3, True), (16, 3, 3, True), (12, 1, 1, True), (12, 3, 5, False)],
)
def test_one_kernel_is_composed_where_that_is_less_work(heads, ratio, kernel_size, pays):
    assert composing_is_faster(heads, ratio * heads, kernel_size) is pays
    assert (steps_of(linear(heads, ratio, kernel_size), SCALE).reduce_HE is None) is pays


@pytest.mark.parametrize("form", FORCED)
@pytest.mark.parametrize("source", [maps, scores])
def test_gradients_pass_gradcheck(source, form, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 200)
    monkeypatch.setattr(linear_tiled, "STEP_COST", FORCED[form])
    attn, value, refiner = source(2, 2, 5), leaf(2, 2, 5, 5), linear(2, 2)

    def refine(*_):
        return attention.refine(attn, value, refiner, SCALE, backend="tiled")

    assert torch.autograd.gradcheck(refine, leaves(attn, value, refiner))


def test_dropout_drops_entries_of_the_map_and_repeats_them_in_backward():
    """Out is linear in the values, so its gradient tells which map was used: the same one as forward."""
    pair, refiner = scores(2, 3, 9, dropout=0.5), linear(3, 2, kernel_size=1, expand=False)
    value = torch.eye(9).double().expand(2, 3, 9, 9).clone().requires_grad_()
    refined = attention.refine(pair, value, refiner, 1.0, backend="tiled")  # times the identity: the refined map itself
    dropped = (refined == 0).double().mean()
    assert 0.3 < dropped < 0.7
    direction = torch.randn_like(refined)
    (gradient,) = torch.autograd.grad(refined, value, direction)
    torch.testing.assert_close(gradient, refined.detach().mT @ direction)


def in_single(refiner: LinearWeights) -> LinearWeights:
    """The same weights in fp32, as new leaves."""
    expand, kernel, reduce = (
        tensor.detach().float().requires_grad_()
        for tensor in (refiner.expand_EH, refiner.local.kernels[0], refiner.reduce_HE)
    )
    return LinearWeights(expand, refiner.local._replace(kernels=(kernel,)), reduce)


def half_precision_errors(backends: tuple[str, ...]) -> list[list[float]]:
    """Each way's error under bf16 autocast, of the output and every gradient, against float64 on the same inputs."""
    refiner, direction = linear(6, 3), torch.randn(2, 6, 40, 8).bfloat16()
    halves = [torch.randn(2, 6, 40, 8).bfloat16() for _ in range(3)]

    def run(backend: str, dtype: torch.dtype, weights: LinearWeights) -> list[torch.Tensor]:
        q, k, v = (tensor.to(dtype).requires_grad_() for tensor in halves)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = forward_and_backward(DeferredMap(q, k, SCALE), v, weights, backend, direction)
        assert found[0].dtype == dtype
        return found

    truth = run("eager", torch.float64, refiner)
    return [
        [((half.double() - exact).norm() / exact.norm()).item() for half, exact in zip(found, truth, strict=True)]
        for found in (run(backend, torch.bfloat16, in_single(refiner)) for backend in backends)
    ]


@pytest.mark.parametrize(("form", "share"), [("composed", 0.9), ("in steps", 1.1)])
def test_half_precision_errs_no_more_than_eager_autocast(form, share, bf16_products, monkeypatch):
    """Averaged over draws; composed, a map is rounded once on its way and not three times.

    0.77 and 0.91 at most are measured, less where products are fp32.
    """
    monkeypatch.setattr(linear_tiled, "STEP_COST", FORCED[form])
    torch.manual_seed(0)
    ours, plain = torch.tensor([half_precision_errors(("tiled", "eager")) for _ in range(5)]).mean(0)
    assert (ours < share * plain).all(), ours / plain


def test_the_kernel_is_composed_exactly_under_autocast():
    refiner = linear(3, 2)
    single = in_single(refiner)
    with torch.autocast("cpu", torch.bfloat16):
        steps = steps_of(single, SCALE)
    assert steps.groups == 1 and steps.kernel.dtype == torch.float32
    torch.testing.assert_close(steps.kernel.double(), steps_of(refiner, SCALE).kernel, rtol=1e-5, atol=1e-5)
