"""Ragged batches: sequences of different lengths, each alone, and all of them padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import BottleneckWeights, DeferredMap, RefinerWeights, equations
from tests.attention.cases import SCALE, leaf, leaves, norms_of, relative_errors

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


def of_ragged_maps(maps: list[Tensor], weights: BottleneckWeights) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The bottleneck on maps of different sizes, [H, n, n] each, one after the other, with statistics over all."""
    used = []

    def normalise(pieces: list[Tensor], one) -> list[Tensor]:
        entries = torch.cat([x.flatten(1) for x in pieces], 1)
        used.append((entries.mean(1), entries.var(1)))
        moments = entries.mean(1), entries.var(1, correction=0)
        return [equations.normalize(x[None], one.weight, one.bias, moments, one.eps)[0] for x in pieces]

    first, second, third, last = norms_of(weights)
    kernel = weights.local.kernels[0]
    expanded = normalise([equations.expand(x[None], weights.expand_EH)[0] for x in maps], first)
    local = [equations.distributed_local_attention(F.relu6(x)[None], kernel)[0] for x in expanded]
    activated = [F.relu6(x)[None] for x in normalise(local, second)]
    reduced = normalise([equations.reduce(x, weights.reduce_HE)[0] for x in activated], third)
    return normalise([x + y for x, y in zip(reduced, maps, strict=True)], last), used


def check_statistics_are_of_real_entries(mask: Tensor, weights: BottleneckWeights, backend: str, save: str) -> None:
    """A bottleneck trains on a padded batch as on maps of different sizes, with statistics over all, in float64.

    Args:
        mask: which tokens are real, [B, N].
        save: what is saved for backward.
    """
    before = [(one.running_mean.clone(), one.running_var.clone()) for one in norms_of(weights)]
    alone, padded = ragged(mask)
    made = [equations.attention_map(q[None], k[None], SCALE)[0] for q, k, _ in alone]
    refined, used = of_ragged_maps(made, weights)
    truth = [x @ v * SCALE for x, (_, _, v) in zip(refined, alone, strict=True)]
    deferred = DeferredMap(padded[0], padded[1], SCALE, 0.0, mask)
    out = attention.refine(deferred, padded[2], weights, SCALE, backend=backend, save_for_backward=save)
    parts = [out[image, :, row] for image, row in enumerate(mask)]
    assert max(relative_errors(parts, truth)) < 1e-12
    assert not out.movedim(1, 2)[~mask].any()
    for one, (mean, variance), (old_mean, old_variance) in zip(norms_of(weights), used, before, strict=True):
        torch.testing.assert_close(one.running_mean, old_mean.lerp(mean, one.momentum), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.running_var, old_variance.lerp(variance, one.momentum), rtol=1e-12, atol=1e-12)
        assert one.batches == 1
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, [*padded, *leaves(weights)], direction)
    inputs = [x for sequence in alone for x in sequence]
    towards = [direction[image, :, row] for image, row in enumerate(mask)]
    expected = iter(torch.autograd.grad(truth, [*inputs, *leaves(weights)], towards))
    for image, row in enumerate(mask):
        for grad in grads[:3]:
            assert (grad[image, :, row] - (wanted := next(expected))).abs().max() < 1e-11 * max(wanted.abs().max(), 1)
    for grad in grads[:3]:
        assert not grad.movedim(1, 2)[~mask].any()
    for ours, wanted in zip(grads[3:], expected, strict=True):
        assert (ours - wanted).abs().max() < 1e-11 * max(wanted.abs().max(), 1)  # of the third norm's bias it is zero
