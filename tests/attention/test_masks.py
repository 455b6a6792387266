"""Padded sequences: each comes out as it would alone, and padding leaves nothing in statistics or gradients."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, Refiner
from refiner_ds.attention.tiling import tiles
from tests.attention.cases import SCALE, bottleneck, in_dtype, leaf, leaves, linear, restore, statistics
from tests.attention.ragged import (
    HEADS,
    REAL,
    WIDTH,
    check_alone_equals_padded,
    check_statistics_are_of_real_entries,
    ragged,
)

REFINERS = {
    "linear, composed": lambda: linear(HEADS, 3),
    "linear, in steps": lambda: linear(HEADS, 1, 5),
    "linear, no reduction": lambda: linear(HEADS, 2, reduce=False),
    "bottleneck": lambda: bottleneck(HEADS, 2, training=False),
}


@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("source", ["scores", "maps"])
@pytest.mark.parametrize("where", REAL)
@pytest.mark.parametrize("kind", REFINERS)
def test_a_sequence_alone_equals_itself_padded(kind, where, source, backend, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    differentiable = kind != "bottleneck" or backend == "eager"
    check_alone_equals_padded(REAL[where], REFINERS[kind](), backend, source, differentiable)


@pytest.mark.parametrize("save", ["map", "activations"])
@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("where", REAL)
def test_statistics_in_training_are_those_of_real_entries(where, backend, tile_bytes, save, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    check_statistics_are_of_real_entries(REAL[where], bottleneck(HEADS, 2), backend, save)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("make", [linear, bottleneck])
def test_a_sequence_of_padding_alone_is_zero_and_harms_nothing(make, backend):
    mask = torch.tensor([[True] * 3, [False] * 3])
    q, k, v = (leaf(2, HEADS, 3, WIDTH) for _ in range(3))
    weights = make(HEADS, 2)
    out = attention.refine(DeferredMap(q, k, SCALE, 0.0, mask), v, weights, SCALE, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), leaves(q, k, v, weights))
    assert not out[1].any() and all(grad.isfinite().all() for grad in grads) and not grads[0][1].any()


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_a_residual_map_leaves_nothing_in_padding(backend):
    mask = torch.tensor([[True] * 3, [True, False, False]])
    q, k, v = (leaf(2, HEADS, 3, WIDTH) for _ in range(3))
    residual = torch.rand(2, HEADS, 3, 3).double()
    out, made = attention.attend(DeferredMap(q, k, SCALE, 0.0, mask), v, residual, backend)
    assert not made[1, :, 1:].any() and not made[1, :, :, 1:].any() and not out[1, :, 1:].any()
    torch.testing.assert_close(made[1, :, 0, 0], 1 + SCALE * residual[1, :, 0, 0])


def test_a_masked_map_attends_to_real_keys_alone():
    mask = REAL["at the end"]
    alone, padded = ragged(mask)
    results = [
        attention.attend(DeferredMap(*padded[:2], SCALE, 0.0, mask), padded[2], backend=b) for b in ("eager", "tiled")
    ]
    for out, made in results:
        for image, (row, (q, k, v)) in enumerate(zip(mask, alone, strict=True)):
            truth, _ = attention.attend(DeferredMap(q[None], k[None], SCALE), v[None], backend="eager")
            torch.testing.assert_close(out[image, :, row], truth[0], rtol=1e-12, atol=1e-12)
        assert not made.movedim(1, 3)[~(mask[:, :, None] & mask[:, None])].any()
    plain = attention.plain_attention(DeferredMap(*padded[:2], SCALE, 0.0, mask), padded[2])
    torch.testing.assert_close(plain.movedim(1, 2)[mask], results[0][0].movedim(1, 2)[mask])


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_in_single_precision_statistics_are_those_of_float64(backend):
    mask, weights = REAL["at the front"], bottleneck(HEADS, 2)
    _, padded = ragged(mask)
    before, counted = statistics(weights), []
    for dtype in (torch.float64, torch.float32):
        restore(weights, before)
        q, k, v = (x.detach().to(dtype) for x in padded)
        attention.refine(DeferredMap(q, k, SCALE, 0.0, mask), v, in_dtype(weights, dtype), SCALE, backend)
        counted.append(statistics(weights))
    for ours, truth in zip(counted[1], counted[0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"mask has shape \[2, 4\]; beside these values it must be \[2, 5\]"),
        (torch.ones(2, 5), "mask is float32; it must be bool, True for real tokens"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(mask, said):
    q, k, v = (torch.randn(2, HEADS, 5, WIDTH) for _ in range(3))
    with pytest.raises(ValueError, match=said):
        attention.refine(DeferredMap(q, k, SCALE, 0.0, mask), v, linear(HEADS, 2))
    with pytest.raises(ValueError, match=said):
        attention.attend(DeferredMap(q, k, SCALE, 0.0, mask), v)


def test_padding_and_a_patch_grid_are_refused_together():
    weights = linear(HEADS, 1)
    kernels = tuple(torch.randn(HEADS, 1, 3, 3) for _ in range(2))
    weights = weights._replace(local=attention.LocalKernels(kernels, "spatial", (2, 2)))
    made, value = torch.rand(1, HEADS, 4, 4), torch.randn(1, HEADS, 4, WIDTH)
    with pytest.raises(ValueError, match="padded sequences have no patch grid"):
        attention.refine(made, value, weights, mask_BN=torch.ones(1, 4, dtype=torch.bool))


def test_a_refiner_that_knows_no_mask_is_refused_one(monkeypatch):
    row = Refiner("mixing", lambda attn, weights, scale: attn * scale)
    monkeypatch.setitem(attention.REFINERS, attention.LinearWeights, row)
    made, value = torch.rand(1, HEADS, 4, 4), torch.randn(1, HEADS, 4, WIDTH)
    with pytest.raises(ValueError, match="mixing takes no mask"):
        attention.refine(made, value, linear(HEADS, 1), mask_BN=torch.ones(1, 4, dtype=torch.bool))
