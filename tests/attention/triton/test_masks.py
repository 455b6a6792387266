"""Kernels make maps of padded sequences, forward and backward, as the equations do."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from tests.attention.cases import SCALE, in_dtype, leaf, leaves, linear, relative_errors

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
