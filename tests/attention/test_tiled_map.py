"""Maps made by tiles: eager's numbers, dropout that repeats itself, and gradients without a map saved."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention.tiling import tiles
from tests.attention.cases import leaf, leaves, maps, relative_errors, scores


@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 9), (1, 3, 12)])
def test_maps_and_gradients_equal_eager(shape, with_residual, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    pair, value, residual = scores(*shape), leaf(*shape, 5), maps(*shape) if with_residual else None
    directions = torch.randn_like(value), torch.randn(*shape, shape[2]).double()
    results = []
    for backend in ("tiled", "eager"):
        out = attention.attend(pair, value, residual, backend=backend)
        results.append([*out, *torch.autograd.grad(out, leaves(pair, value, residual), directions)])
    assert max(relative_errors(*results)) < 1e-12


def test_gradients_pass_gradcheck(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 100)
    pair, value, residual = scores(2, 2, 4), leaf(2, 2, 4, 5), maps(2, 2, 4)
    inputs = leaves(pair, value, residual)
    assert torch.autograd.gradcheck(lambda *_: attention.attend(pair, value, residual, backend="tiled"), inputs)


def test_dropout_passes_gradients_where_it_kept_entries_and_only_there(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 300)
    pair, value, residual = scores(2, 3, 9, dropout=0.25), leaf(2, 3, 9, 5), maps(2, 3, 9)
    _, made = attention.attend(pair, value, residual, backend="tiled")
    kept = (made != 0).double()
    assert 0.6 < kept.mean() < 0.9
    whole = attention.attend(pair._replace(dropout=0.0), value, residual, backend="tiled")[1]
    torch.testing.assert_close(made, whole * kept / 0.75)
    direction = torch.randn_like(made)
    ours = torch.autograd.grad(made, leaves(pair, residual), direction)
    truth = torch.autograd.grad(whole, leaves(pair, residual), direction * kept / 0.75)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["tiled", "eager"])
def test_dropout_of_everything_leaves_nothing(backend):
    assert not attention.attend(scores(1, 2, 5, dropout=1.0), leaf(1, 2, 5, 5), backend=backend)[1].any()


def test_logits_of_half_precision_queries_are_not_rounded():
    """Logits about 30 have no digits behind the point in bf16; the map must have all that bf16 holds of it."""
    q, k = (torch.randn(1, 2, 40, 8).mul(3).bfloat16() for _ in range(2))
    made = attention.attend(attention.DeferredMap(q, k, 1.0), q, backend="tiled")[1].double()
    exact = attention.equations.attention_map(q.double(), k.double(), 1.0)
    torch.testing.assert_close(made, exact, rtol=2**-8, atol=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_what_it_changes_in_eager(dtype):
    found = []
    for backend in ("tiled", "eager"):
        torch.manual_seed(0)
        q, k, value = (leaf(2, 3, 9, 5, dtype=dtype) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            out, made = attention.attend(attention.DeferredMap(q, k, 0.3), value, backend=backend)
        grads = torch.autograd.grad(out.sum(), (q, k, value))
        found.append([(x.dtype, x.shape) for x in (out, made, *grads)])
    assert found[0] == found[1]


def test_dropout_follows_the_global_generator():
    pair, value = scores(2, 3, 9, dropout=0.5), leaf(2, 3, 9, 5)
    first, again, other = (
        attention.attend(pair, value, backend="tiled")[1] for seed in (1, 1, 2) if torch.manual_seed(seed)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_residual_map_in_half_precision_keeps_the_softmaxs_own_gradients():
    """With 40 keys and a residual-on map of ones the softmax is lost in A's last bits; its gradients must not be."""
    q, k, value = (torch.randn(1, 2, 40, 8).bfloat16() for _ in range(3))
    residual = torch.ones(1, 2, 40, 40).bfloat16()
    direction = torch.randn(1, 2, 40, 40)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        pair = attention.DeferredMap(q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), 8**-0.5)
        made = attention.attend(pair, value.to(dtype), residual.to(dtype), backend="tiled")[1]
        gradients.append(torch.autograd.grad(made, pair[:2], direction.bfloat16().to(dtype)))
    for half, exact in zip(*gradients, strict=True):
        assert ((half.double() - exact).norm() / exact.norm()).item() < 0.01
