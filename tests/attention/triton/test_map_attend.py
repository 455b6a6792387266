"""A map made and multiplied with in one function: eager's numbers, wherever gradients come from."""

from __future__ import annotations

from itertools import compress, product

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, equations, make_map
from refiner_ds.attention.kernels.padded import row_stride
from refiner_ds.attention.map import triton
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.triton.test_maps import TOLERANCE, error, inputs, several_tiles  # noqa: F401  a fixture
from tests.marks import long_where

SCALE = 0.3


def plainly(
    scores: DeferredMap, value: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    made = make_map(scores, residual)
    return equations.attend(made, value), made


@pytest.mark.parametrize(
    ("used", "with_residual", "dtype"),
    long_where(
        lambda used, with_residual, dtype: with_residual != (dtype == torch.float32),
        product([(True, False), (False, True), (True, True)], [False, True], TOLERANCE),
    ),
)
def test_output_map_and_gradients_equal_eager(used, with_residual, dtype, device):
    leaves = inputs((2, 3, 35, 5), dtype, device)
    leaves.append(torch.randn(2, 35, 3, 5, device=device).to(dtype).transpose(1, 2).requires_grad_())
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    directions = [torch.randn(2, 3, 35, width, device=device).to(dtype) for width in (5, 35)]
    results = []
    for (q, k, residual, value), attend in ((leaves, triton.attend), (doubles, plainly)):
        both = attend(DeferredMap(q, k, SCALE), value, residual if with_residual else None)
        outputs, towards = compress(both, used), compress(directions, used)
        wanted = [q, k, *([value] if used[0] else []), *([residual] if with_residual else [])]
        grads = torch.autograd.grad([*outputs], wanted, [x.to(both[0].dtype) for x in towards])
        results.append([*(x.detach() for x in both), *grads])
    errors = [error(*pair) for pair in zip(*results, strict=True)]
    assert all(x.dtype == dtype for x in results[0])
    assert max(errors) < TOLERANCE[dtype], errors


def test_the_map_that_is_passed_on_is_saved_and_nothing_else_of_its_size(device):
    made: list[torch.Tensor] = []

    def kept(tokens: int) -> int:
        q, k, v = (torch.randn(1, 2, tokens, 4, device=device).bfloat16().requires_grad_() for _ in range(3))
        scores = DeferredMap(q, k, SCALE)
        found = saved_bytes(lambda: made.append(attention.attend(scores, v, backend="triton")[1]), torch.nn.Module())
        assert made[-1].data_ptr() in [x.data_ptr() for x in made[-1].grad_fn.saved_tensors if x is not None]
        return found

    around = 3 * 2 * 4 * 2 + 2 * 4  # of q, k, v and the log-sum-exps, for every token
    assert kept(16) - kept(8) == 2 * 2 * (16 * row_stride(16) - 8 * row_stride(8)) + 8 * around


def test_dropout_drops_the_map_that_is_multiplied_with(device):
    q, k, residual = inputs((1, 2, 35, 8), torch.float32, device)
    value = torch.randn(1, 2, 35, 8, device=device, requires_grad=True)
    dropping = DeferredMap(q, k, SCALE, 0.25)
    torch.manual_seed(1)
    out, made = triton.attend(dropping, value, residual)
    torch.manual_seed(1)
    again = triton.make_map(dropping, residual)
    assert torch.equal(made, again)
    torch.testing.assert_close(out, again @ value)
    ours = torch.autograd.grad(out, [q, k, residual, value], torch.ones_like(out))
    truth = torch.autograd.grad(again @ value, [q, k, residual, value], torch.ones_like(out))
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_values_that_are_unlike_queries_are_multiplied_all_the_same(device):
    q, k, residual = (x.detach() for x in inputs((1, 2, 9, 8), torch.float32, device))
    for value in (torch.randn(1, 2, 9, 3, device=device), torch.randn(1, 2, 9, 8, device=device).bfloat16()):
        out, made = triton.attend(DeferredMap(q, k, SCALE), value, residual)
        assert out.dtype == made.dtype == value.dtype
        assert (
            error(out, plainly(DeferredMap(q.double(), k.double(), SCALE), value.double(), residual.double())[0]) < 2e-2
        )
