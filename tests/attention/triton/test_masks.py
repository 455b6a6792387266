"""Kernels make and refine maps of padded sequences, forward and backward, as the equations do."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.attention.bottleneck import triton_backward, triton_backward_local, triton_forward
from refiner_ds.attention.dispatch import TRITON
from refiner_ds.attention.kernels import moments
from refiner_ds.attention.kernels.launch import INTERPRETED
from refiner_ds.attention.weights import Case
from tests.attention.cases import (
    SCALE,
    bottleneck,
    in_dtype,
    leaf,
    leaves,
    linear,
    maps,
    norms_of,
    on,
    relative_errors,
    restore,
    statistics,
)
from tests.attention.ragged import HEADS, REAL, check_alone_equals_padded, check_statistics_are_of_real_entries
from tests.marks import long_where

REFINERS = {
    "linear": lambda: linear(HEADS, 3),
    "linear, no reduction": lambda: linear(HEADS, 2, reduce=False),
    "bottleneck in evaluation": lambda: bottleneck(HEADS, 3, training=False),
}
CASES = [(kind, where, source) for kind in REFINERS for where in REAL for source in ("scores", "maps")]
SHORT = [
    ("linear", "at the front", "scores"), ("linear", "at the end", "maps"),
    ("bottleneck in evaluation", "at the end", "scores"), ("bottleneck in evaluation", "at the front", "maps"),
]  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="kernels take float64 in the interpreter alone")
@pytest.mark.parametrize(("kind", "where", "source"), long_where(lambda *case: case not in SHORT, CASES))
def test_in_float64_a_sequence_alone_equals_itself_padded(kind, where, source):
    weights, mask = REFINERS[kind](), REAL[where]
    value = torch.zeros(len(mask), HEADS, mask.shape[1], 5, dtype=torch.float64)
    with torch.set_grad_enabled(kind != "bottleneck in evaluation"):
        assert TRITON.supports(Case(DeferredMap(value, value, SCALE, 0.0, mask), value, weights, mask)) is None
    check_alone_equals_padded(mask, weights, "triton", source, grads=kind.startswith("linear"))


def small_pieces(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Programs and steps so small that some begin with padding and some have nothing else; ``keys`` of a fragment."""
    for module, sizes in (
        (moments, {"POSITIONS": 16, "STEPS": 3}),
        (triton_forward, {"KEYS": keys, "SEGMENT": 4, "POSITIONS": 16, "STEPS": 3}),
        (triton_backward, {"KEYS": 16, "STEPS": 2, "POSITIONS": 32, "WARPS": 2}),
        (triton_backward_local, {"KEYS": keys, "ROWS": 4, "PROGRAMS": 2}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


# Padding on either side of a fragment's last key, of four or eight, in front, between real tokens, and nothing else.
ANYWHERE = {
    "anywhere": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1, 0, 1], [0] * 9]).bool(),
    "in a whole batch": torch.zeros(2, 9).bool(),
    **REAL,
}
TRAINING = list(product(ANYWHERE, ("maps", "scores"), ("map", "activations"), (4, 8)))
SHORT_TRAINING = [
    ("anywhere", "maps", "map", 8), ("anywhere", "maps", "map", 4), ("in a whole batch", "scores", "map", 8),
    ("at the front", "scores", "activations", 4),
]  # fmt: skip


def trained(attn, value, weights, backend: str, save: str, mask) -> list[torch.Tensor]:
    """Output, every gradient but that of the third norm's bias, which is rounding, and the running statistics."""
    before = statistics(weights)
    bias = norms_of(weights)[2].bias
    wanted = [x for x in leaves(attn, value, weights) if x is not bias]
    out = attention.refine(attn, value, weights, SCALE, backend, save, mask)
    assert not out.movedim(1, 2)[~mask].any()
    found = [out, *torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).view_as(out).to(out))]
    found += statistics(weights)
    restore(weights, before)
    return found


@pytest.mark.skipif(not INTERPRETED, reason="kernels take float64 in the interpreter alone")
@pytest.mark.parametrize(
    ("where", "source", "save", "keys"), long_where(lambda *case: case not in SHORT_TRAINING, TRAINING)
)
def test_in_float64_a_bottleneck_trains_on_padded_sequences_as_by_the_equations(where, source, save, keys, monkeypatch):
    small_pieces(monkeypatch, keys)
    mask, weights = ANYWHERE[where], bottleneck(HEADS, 2)
    batch, tokens = mask.shape
    q, k, value = (leaf(batch, HEADS, tokens, 5) for _ in range(3))
    attn = maps(batch, HEADS, tokens) if source == "maps" else DeferredMap(q, k, SCALE, 0.0, mask)
    assert TRITON.supports(Case(attn, value, weights, mask)) is None
    # Of nothing at all norm 4 has the mean that its algebra says, by tiles and by kernels.
    ours, truth = (
        trained(attn, value, weights, backend, save, mask) for backend in ("triton", "eager" if mask.any() else "tiled")
    )
    assert all(error < 1e-12 for error in relative_errors(ours, truth))  # NaN is not


@pytest.mark.skipif(not INTERPRETED, reason="kernels take float64 in the interpreter alone")
@pytest.mark.parametrize(
    ("where", "save"), long_where(lambda *case: case != ("at the front", "map"), product(REAL, ("map", "activations")))
)
def test_statistics_in_training_are_those_of_real_entries(where, save, monkeypatch):
    small_pieces(monkeypatch, 8)
    check_statistics_are_of_real_entries(REAL[where], bottleneck(HEADS, 2), "triton", save)


@pytest.mark.parametrize("keys", long_where(lambda keys: keys == 4, [4, 8]))
@pytest.mark.parametrize("save", ["map", "activations"])
def test_a_bottleneck_trains_on_padded_sequences_as_by_the_equations(
    save, keys, device, memory_full_of_nan, monkeypatch
):
    small_pieces(monkeypatch, keys)
    mask, weights = ANYWHERE["anywhere"].to(device), on(device, in_dtype(bottleneck(HEADS, 2), torch.float32))
    attn = maps(len(mask), HEADS, mask.shape[1]).detach().float().to(device).requires_grad_()
    value = leaf(len(mask), HEADS, mask.shape[1], 5, dtype=torch.float32).detach().to(device).requires_grad_()
    ours, truth = (trained(attn, value, weights, backend, save, mask) for backend in ("triton", "eager"))
    assert all(error < 1e-5 for error in relative_errors(ours, truth))


# What the same maps err by without padding; the interpreter cuts bfloat16 off instead of rounding it.
LOST = {torch.float16: 5e-3, torch.bfloat16: 0.15}


@pytest.mark.parametrize("dtype", long_where(lambda dtype: dtype == torch.bfloat16, LOST))
def test_in_half_precision_padding_costs_nothing_more(dtype, device, monkeypatch):
    small_pieces(monkeypatch, 8)
    mask, weights = ANYWHERE["anywhere"].to(device), on(device, bottleneck(HEADS, 2))
    attn = maps(len(mask), HEADS, mask.shape[1]).detach().to(device, dtype)
    value = torch.randn(len(mask), HEADS, mask.shape[1], 5).to(device, dtype)
    results = []
    for backend, precision in (("triton", dtype), ("eager", torch.float64)):
        inputs = [x.detach().to(precision).requires_grad_() for x in (attn, value)]
        results.append(trained(*inputs, weights, backend, "activations", mask))
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth.double()).norm() <= LOST[dtype] * truth.double().norm()


TOKENS, LENGTHS = 40, (20, 0)  # two tiles of keys, which begin, end and lie in padding


@pytest.mark.parametrize(("operation", "front"), [("refine", True), ("attend", False)])
def test_padded_sequences_equal_eager(operation, front):
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if front else mask
    q, k, v = (leaf(2, 2, TOKENS, 5, dtype=torch.float32) for _ in range(3))
    weights = in_dtype(linear(2, 2), torch.float32)
    direction = torch.randn(2, 2, TOKENS, 5)

    def run(backend: str) -> list[torch.Tensor]:
        deferred = DeferredMap(q, k, SCALE, 0.0, mask)
        if operation == "refine":
            out = attention.refine(deferred, v, weights, backend=backend)
            return [out, *torch.autograd.grad(out, leaves(q, k, v, weights), direction)]
        out, made = attention.attend(deferred, v, backend=backend)
        return [out, made, *torch.autograd.grad((out * direction).sum() + made.square().sum(), [q, k, v])]

    ours, truth = run("triton"), run("eager")
    assert max(relative_errors(ours, truth)) < 1e-5
    assert not ours[0].movedim(1, 2)[~mask].any()
