"""Ragged batches: sequences of different lengths, each alone, and all of them padded."""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, RefinerWeights, equations
from tests.attention.cases import SCALE, leaf, leaves, relative_errors

HEADS, TOKENS, WIDTH, LENGTHS = 3, 9, 5, (9, 4, 1, 6)
REAL = {
    "at the end": torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None],
    "at the front": torch.arange(TOKENS) >= TOKENS - torch.tensor(LENGTHS)[:, None],
}
GARBAGE = 1e3  # what padding contains


def ragged(mask: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Queries, keys and values of each sequence alone, [H, n, d]; and of all of them padded, [B, H, N, d]."""
    alone = [[leaf(HEADS, int(row.sum()), WIDTH) for _ in range(3)] for row in mask]
    padded = [torch.full((len(mask), HEADS, TOKENS, WIDTH), GARBAGE, dtype=torch.float64) for _ in range(3)]
    for image, (row, sequence) in enumerate(zip(mask, alone, strict=True)):
        for whole, part in zip(padded, sequence, strict=True):
            whole[image, :, row] = part.detach()
    return alone, [x.requires_grad_() for x in padded]


def refine(q, k, v, weights, backend: str, source: str, mask: Tensor | None = None) -> Tensor:
    """Refined maps times values, of queries and keys or of a map with garbage in padding."""
    if source == "scores":
        return attention.refine(DeferredMap(q, k, SCALE, 0.0, mask), v, weights, SCALE, backend=backend)
    made = equations.attention_map(q, k, SCALE, mask)
    if mask is not None:
        made = made + GARBAGE * ~(mask[:, None, :, None] & mask[:, None, None])
    return attention.refine(made, v, weights, SCALE, backend=backend, mask_BN=mask)


def check_alone_equals_padded(mask: Tensor, weights: RefinerWeights, backend: str, source: str, grads: bool) -> None:
    """What a backend computes of a padded batch is what the equations make of each sequence alone, in float64.

    Args:
        mask: which tokens are real, [B, N].
        source: "scores" or "maps", what is refined.
        grads: whether gradients are compared too.
    """
    alone, padded = ragged(mask)
    with torch.set_grad_enabled(grads):
        out = refine(*padded, weights, backend, source, mask)
    assert not out.movedim(1, 2)[~mask].any()
    direction, truth, parts = torch.randn_like(out), [], []
    for image, (row, sequence) in enumerate(zip(mask, alone, strict=True)):
        with torch.set_grad_enabled(grads):
            truth.append(refine(*(x[None] for x in sequence), weights, "eager", source)[0])
        parts.append(out[image, :, row])
    assert max(relative_errors(parts, truth)) < 1e-12
    if not grads:
        return
    ours = torch.autograd.grad(out, [*padded, *leaves(weights)], direction)
    inputs = [x for sequence in alone for x in sequence]
    towards = [direction[image, :, row] for image, row in enumerate(mask)]
    expected = iter(torch.autograd.grad(truth, [*inputs, *leaves(weights)], towards, allow_unused=True))
    for image, row in enumerate(mask):
        found = [grad[image, :, row] for grad in ours[:3]]
        likely = [next(expected) for _ in found]
        scale = max(x.abs().max().item() for x in likely)
        assert max((x - y).abs().max().item() for x, y in zip(found, likely, strict=True)) < 1e-12 * max(scale, 1)
    for grad in ours[:3]:
        assert not grad.movedim(1, 2)[~mask].any()
    for grad, wanted in zip(ours[3:], expected, strict=True):
        assert relative_errors([grad], [wanted])[0] < 1e-11
