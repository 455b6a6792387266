"""Kernels make maps of padded sequences, forward and backward, as the equations do."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.attention.dispatch import TRITON
from refiner_ds.attention.kernels.launch import INTERPRETED
from refiner_ds.attention.weights import Case
from tests.attention.cases import SCALE, bottleneck, in_dtype, leaf, leaves, linear, relative_errors
from tests.attention.ragged import HEADS, REAL, check_alone_equals_padded
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
