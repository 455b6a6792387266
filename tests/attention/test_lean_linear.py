"""The lean linear refiner computes what the plain composition does, from maps and from queries and keys."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import tiles
from refiner_ds.attention.lean_linear import one_kernel
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

STEPS = {"whole": {}, "no reduction": {"reduce": False}, "local alone": {"expand": False}}


@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("source", [maps, scores])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_plain_composition(shape, steps, source, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    batch, heads, tokens, ratio, kernel_size = shape
    attn, value = source(batch, heads, tokens), leaf(batch, heads, tokens, 5)
    refiner = linear(heads, ratio, kernel_size, **STEPS[steps])
    maps_out = ratio * heads if steps == "no reduction" else heads
    direction = torch.randn(batch, maps_out, tokens, 5).double()
    truth = forward_and_backward(attn, value, refiner, "reference", direction)
    ours = forward_and_backward(attn, value, refiner, "lean", direction)
    errors = relative_errors(ours, truth)
    assert max(errors) < 1e-12, errors


@pytest.mark.parametrize("source", [maps, scores])
def test_gradients_pass_gradcheck(source, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 200)
    attn, value, refiner = source(2, 2, 5), leaf(2, 2, 5, 5), linear(2, 2)

    def refine(*_):
        return attention.refine(attn, value, refiner, SCALE, way="lean")

    assert torch.autograd.gradcheck(refine, leaves(attn, value, refiner))


def test_dropout_drops_entries_of_the_map_and_repeats_them_in_backward():
    """Out is linear in the values, so its gradient tells which map was used: the same one as forward."""
    pair, refiner = scores(2, 3, 9, dropout=0.5), linear(3, 2, kernel_size=1, expand=False)
    value = torch.eye(9).double().expand(2, 3, 9, 9).clone().requires_grad_()
    refined = attention.refine(pair, value, refiner, 1.0, way="lean")  # times the identity: the refined map itself
    dropped = (refined == 0).double().mean()
    assert 0.3 < dropped < 0.7
    direction = torch.randn_like(refined)
    (gradient,) = torch.autograd.grad(refined, value, direction)
    torch.testing.assert_close(gradient, refined.detach().mT @ direction)


def test_half_precision_errs_no_more_than_plain_autocast():
    pair, value, refiner = scores(2, 6, 40, 8), leaf(2, 6, 40, 8), linear(6, 3)
    halves = [tensor.detach().bfloat16() for tensor in (*pair[:2], value)]
    exact = [tensor.double().requires_grad_() for tensor in halves]
    direction = torch.randn_like(value).bfloat16().double()
    truth = forward_and_backward(
        pair._replace(q_BHNd=exact[0], k_BHNd=exact[1]), exact[2], refiner, "reference", direction
    )
    errors = {}
    for way in ("reference", "lean"):
        q, k, v = (tensor.clone().requires_grad_() for tensor in halves)
        single = linear(6, 3)
        with torch.no_grad():
            for mine, theirs in zip(leaves(single), leaves(refiner), strict=True):
                mine.copy_(theirs)
        single = type(single)(
            single.expand_EH.detach().float().requires_grad_(),
            single.local._replace(kernels=(single.local.kernels[0].detach().float().requires_grad_(),)),
            single.reduce_HE.detach().float().requires_grad_(),
        )
        with torch.autocast("cpu", torch.bfloat16):
            half = forward_and_backward(pair._replace(q_BHNd=q, k_BHNd=k), v, single, way, direction)
        assert half[0].dtype == torch.bfloat16
        errors[way] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(half, truth, strict=True)]
    assert all(ours < theirs for ours, theirs in zip(errors["lean"], errors["reference"], strict=True)), errors


def test_the_kernel_is_composed_exactly_under_autocast():
    refiner = linear(3, 2)
    single = type(refiner)(
        refiner.expand_EH.float(),
        refiner.local._replace(kernels=(refiner.local.kernels[0].float(),)),
        refiner.reduce_HE.float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        kernel, groups = one_kernel(single)
    assert groups == 1 and kernel.dtype == torch.float32
    torch.testing.assert_close(kernel.double(), one_kernel(refiner)[0], rtol=1e-5, atol=1e-5)
