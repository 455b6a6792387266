"""Each equation of equations.py equals loops over single indices, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from refiner_ds.attention import equations
from tests.attention import naive

B, H, E, GRID, WIDTH = 2, 2, 6, (2, 3), 3
N = 1 + GRID[0] * GRID[1]
SCALE = WIDTH**-0.5


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def maps(count: int = H) -> Tensor:
    return random(B, count, N, N).softmax(-1)


def assert_equal(ours: Tensor, loops: np.ndarray) -> None:
    np.testing.assert_allclose(ours.numpy(), loops, rtol=1e-12, atol=1e-14)


def numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]


def test_attention_map_is_the_softmax_over_keys():
    q, k = random(B, H, N, WIDTH), random(B, H, N, WIDTH)
    assert_equal(equations.attention_map(q, k, SCALE), naive.attention_map(*numpy(q, k), SCALE))


def test_attention_map_of_half_precision_scores_is_fp32():
    q = random(B, H, N, WIDTH).bfloat16()
    assert equations.attention_map(q, q, SCALE).dtype == torch.float32


def test_passed_on_maps_accumulate():
    own, residual = maps(), maps()
    assert_equal(equations.accumulate(own, residual, SCALE), naive.accumulate(*numpy(own, residual), SCALE))


def test_expansion_and_reduction_mix_maps():
    attn, up, down = maps(), random(E, H), random(H, E)
    wide = equations.expand(attn, up)
    assert_equal(wide, naive.mix(*numpy(attn, up)))
    assert_equal(equations.reduce(wide, down), naive.mix(*numpy(wide, down)))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_local_attention_convolves_each_map_with_its_own_kernel(kernel_size):
    wide, kernel = maps(E), random(E, 1, kernel_size, kernel_size)
    assert_equal(equations.distributed_local_attention(wide, kernel), naive.local(*numpy(wide, kernel)))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_linear_refiner_equals_its_composed_kernel_and_its_shifts(kernel_size):
    attn, value = maps(), random(B, H, N, WIDTH)
    up, kernel, down = random(E, H), random(E, 1, kernel_size, kernel_size), random(H, E)
    loops = naive.mix(naive.local(naive.mix(*numpy(attn, up)), kernel.numpy()), down.numpy())
    assert_equal(equations.linear_refiner(attn, up, kernel, down), loops)
    eager = equations.compose_kernel(up, kernel, down)
    assert_equal(equations.dense_refiner(attn, eager), naive.dense(*numpy(attn, eager)))
    assert_equal(equations.dense_refiner(attn, eager), loops)
    shifted = equations.refined_by_shifts(attn, eager, value)
    assert_equal(shifted, naive.attend(loops, value.numpy()))


def test_values_are_shared_by_the_maps_of_a_head_when_nothing_is_reduced():
    wide, value = maps(E), random(B, H, N, WIDTH)
    assert_equal(equations.attend(wide, value), naive.attend(*numpy(wide, value)))


def test_batch_moments_and_normalising():
    wide, weight, bias = maps(E), random(E), random(E)
    mean, variance = equations.batch_moments(wide)
    for ours, loops in zip((mean, variance), naive.moments(wide.numpy()), strict=True):
        assert_equal(ours, loops)
    ours = equations.normalize(wide, weight, bias, (mean, variance), eps=1e-5)
    assert_equal(ours, naive.normalize(*numpy(wide, weight, bias, mean, variance), 1e-5))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_bottleneck_with_batch_and_with_running_statistics(statistics):
    attn, up, kernel, down = maps(), 3 * random(E, H), random(E, 1, 3, 3), random(H, E)
    widths = (E, E, H, H)
    affines = [(random(width), random(width)) for width in widths]
    running = [(random(width) / N, random(width).abs() / N) for width in widths]
    ours, used = equations.bottleneck(
        attn, up, kernel, down, affines, running if statistics == "running" else None, eps=1e-5
    )

    def norm(x: np.ndarray, index: int) -> np.ndarray:
        moments = naive.moments(x) if statistics == "batch" else numpy(*running[index])
        for truth, given in zip(moments, used[index], strict=True):
            np.testing.assert_allclose(given.numpy(), truth, rtol=1e-12)
        return naive.normalize(x, *numpy(*affines[index]), *moments, 1e-5)

    wide = naive.relu6(norm(naive.mix(*numpy(attn, up)), 0))
    wide = naive.relu6(norm(naive.local(wide, kernel.numpy()), 1))
    loops = norm(norm(naive.mix(wide, down.numpy()), 2) + attn.numpy(), 3)
    assert 0 < (wide == 0).mean() < 1  # both sides of the clip are exercised
    assert_equal(ours, loops)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("classes", [0, 1])
def test_local_attention_over_the_patch_grid_of_one_axis(axis, classes):
    tokens = classes + GRID[0] * GRID[1]
    wide, kernel = random(B, E, tokens, tokens), random(E, 1, 3, 3)
    ours = equations.local_over_grid(wide, kernel, GRID, axis)
    assert_equal(ours, naive.over_grid(*numpy(wide, kernel), GRID, axis))


def test_spatial_constraint_runs_over_keys_then_queries():
    wide, keys, queries = maps(E), random(E, 1, 3, 3), random(E, 1, 3, 3)
    loops = naive.over_grid(naive.over_grid(*numpy(wide, keys), GRID, "keys"), queries.numpy(), GRID, "queries")
    assert_equal(equations.spatial_local_attention(wide, keys, queries, GRID), loops)


def test_row_and_column_constraint_runs_along_the_grid():
    wide = maps(E)
    kernels = (random(E, 1, 1, 3), random(E, 1, 3, 1), random(E, 1, 1, 3), random(E, 1, 3, 1))
    loops = wide.numpy()
    for kernel, axis in zip(kernels, ("keys", "keys", "queries", "queries"), strict=True):
        loops = naive.over_grid(loops, kernel.numpy(), GRID, axis)
    assert_equal(equations.row_and_column_local_attention(wide, kernels, GRID), loops)
