"""attention.refine equals the reference in every mode, forward and backward, and counts statistics once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import BottleneckWeights, DeferredMap, LinearWeights, LocalKernels, Norm, equations

B, H, GRID, WIDTH, SCALE = 3, 4, (2, 4), 5, 5**-0.5
N = 1 + GRID[0] * GRID[1]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def local_kernels(maps: int, kernel_size: int = 3, constraint: str = "none") -> LocalKernels:
    shapes = attention.kernel_shapes(constraint, kernel_size).values()
    return LocalKernels(tuple(leaf(maps, 1, *shape) for shape in shapes), constraint, GRID)


def norm(maps: int, training: bool) -> Norm:
    mean, variance = torch.zeros(maps).double(), torch.ones(maps).double()
    return Norm(leaf(maps), leaf(maps), mean, variance, torch.zeros((), dtype=torch.int64), training)


def bottleneck(ratio: int, training: bool) -> BottleneckWeights:
    wide = ratio * H
    return BottleneckWeights(
        leaf(wide, H), norm(wide, training), local_kernels(wide), norm(wide, training),
        leaf(H, wide), norm(H, training), norm(H, training),
    )  # fmt: skip


def norms_of(refiner: BottleneckWeights) -> list[Norm]:
    return [refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H]


def leaves(refiner) -> list[Tensor]:
    flat: list[Tensor] = []
    for part in refiner:
        parts = part.kernels if isinstance(part, LocalKernels) else part if isinstance(part, Norm) else (part,)
        flat += [tensor for tensor in parts if isinstance(tensor, Tensor) and tensor.requires_grad]
    return flat


def assert_same_with_gradients(ours: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    given, expected = (torch.autograd.grad(out, inputs, direction) for out in (ours, truth))
    # The bias of the third norm has no gradient at all; what is left of it is rounding.
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_linear_refiner_equals_the_equations(ratio, kernel_size):
    q, k, value = leaf(B, H, N, WIDTH), leaf(B, H, N, WIDTH), leaf(B, H, N, WIDTH)
    refiner = LinearWeights(leaf(ratio * H, H), local_kernels(ratio * H, kernel_size), leaf(H, ratio * H))
    ours = attention.refine(DeferredMap(q, k, SCALE), value, refiner)
    attn = equations.attention_map(q, k, SCALE)
    refined = equations.linear_refiner(attn, refiner.expand_EH, refiner.local.kernels[0], refiner.reduce_HE)
    assert_same_with_gradients(ours, equations.attend(refined, value), [q, k, value, *leaves(refiner)])


@pytest.mark.parametrize("constraint", ["spatial", "row+col"])
def test_linear_refiner_under_a_constraint_equals_the_equations(constraint):
    attn, value = leaf(B, H, N, N), leaf(B, H, N, WIDTH)
    refiner = LinearWeights(leaf(8, H), local_kernels(8, 3, constraint), leaf(H, 8))
    wide = equations.expand(attn, refiner.expand_EH)
    if constraint == "spatial":
        wide = equations.spatial_local_attention(wide, *refiner.local.kernels, GRID)
    else:
        wide = equations.row_and_column_local_attention(wide, refiner.local.kernels, GRID)
    truth = equations.attend(equations.reduce(wide, refiner.reduce_HE), value)
    assert_same_with_gradients(attention.refine(attn, value, refiner), truth, [attn, value, *leaves(refiner)])


def test_expansion_and_reduction_can_be_left_out():
    attn, value = leaf(B, H, N, N), leaf(B, H, N, WIDTH)
    alone = LinearWeights(None, local_kernels(H), None)
    convolved = equations.distributed_local_attention(attn, alone.local.kernels[0])
    assert_same_with_gradients(
        attention.refine(attn, value, alone), equations.attend(convolved, value), [attn, value, *leaves(alone)]
    )
    wide = LinearWeights(leaf(2 * H, H), local_kernels(2 * H), None)
    assert attention.refine(attn, value, wide).shape == (B, 2 * H, N, WIDTH)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("training", [True, False])
def test_bottleneck_equals_the_equations(ratio, training):
    attn, value = leaf(B, H, N, N), leaf(B, H, N, WIDTH)
    refiner = bottleneck(ratio, training)
    norms = norms_of(refiner)
    running = None if training else [(one.running_mean.clone(), one.running_var.clone()) for one in norms]
    affines = [(one.weight, one.bias) for one in norms]
    kernel = refiner.local.kernels[0]
    refined, _ = equations.bottleneck(attn, refiner.expand_EH, kernel, refiner.reduce_HE, affines, running)
    ours = attention.refine(attn, value, refiner, SCALE)
    assert_same_with_gradients(ours, equations.attend(SCALE * refined, value), [attn, value, *leaves(refiner)])


def test_running_statistics_take_the_unbiased_variance_once_a_step():
    attn, value = leaf(B, H, N, N), leaf(B, H, N, WIDTH)
    refiner = bottleneck(3, training=True)
    norms = norms_of(refiner)
    _, used = equations.bottleneck(
        attn, refiner.expand_EH, refiner.local.kernels[0], refiner.reduce_HE, [(one.weight, one.bias) for one in norms]
    )
    attention.refine(attn, value, refiner, SCALE)
    for one, (mean, variance) in zip(norms, used, strict=True):
        count = B * N * N
        torch.testing.assert_close(one.running_mean, 0.1 * mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(one.running_var, 0.9 + 0.1 * variance * count / (count - 1), rtol=1e-12, atol=1e-14)
        assert one.batches == 1


def test_recomputation_leaves_running_statistics_alone():
    attn, value = leaf(B, H, N, N), leaf(B, H, N, WIDTH)
    refiner = bottleneck(3, training=True)
    run = attention.recompute_aware(lambda: attention.refine(attn, value, refiner, SCALE))
    first = run()
    before = [(one.running_mean.clone(), one.running_var.clone(), one.batches.clone()) for one in norms_of(refiner)]
    assert torch.equal(run(), first)
    for one, kept in zip(norms_of(refiner), before, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(one[2:5], kept, strict=True))


def test_dropout_is_on_the_map_that_is_made():
    q, value = leaf(B, H, N, WIDTH), torch.eye(N).double().expand(B, H, N, N)
    out, residual = attention.attend(DeferredMap(q, q, SCALE, dropout=0.5), value)
    dropped = (residual == 0).double().mean()
    assert 0.3 < dropped < 0.7
    assert torch.equal(out, residual)


@pytest.mark.parametrize(
    ("constraint", "kernel_size", "sentence"),
    [
        ("none", 4, "kernel_size is 4; it must be odd"),
        ("none", 0, "kernel_size is 0; it must be odd"),
        ("diagonal", 3, "constraint is 'diagonal'; it must be one of none, spatial, row\\+col"),
    ],
)
def test_kernels_that_cannot_be_are_refused(constraint, kernel_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention.kernel_shapes(constraint, kernel_size)
