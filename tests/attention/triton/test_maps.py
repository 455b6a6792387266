"""Maps made by kernels: eager's numbers and gradients, without a map saved, and dropout that repeats."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from refiner_ds.attention import DeferredMap, make_map
from refiner_ds.attention.kernels.padded import is_padded, to_padded
from refiner_ds.attention.map import triton, triton_kernels
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.triton.test_padded import behind_rows
from tests.marks import long_where

SCALE = 0.3
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(triton_kernels, "ROWS", 16)
    monkeypatch.setattr(triton_kernels, "KEYS", 32)


def inputs(shape, dtype, device) -> list[torch.Tensor]:
    """Queries, keys as slices of one projection, as blocks have them, and a residual map."""
    batch, heads, tokens, width = shape
    both = torch.randn(batch, tokens, 2, heads, width, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    residual = torch.randn(batch, heads, tokens, tokens, device=device).softmax(-1).to(dtype)
    return [both[0].detach().requires_grad_(), both[1].detach().requires_grad_(), residual.requires_grad_()]


def ends_in_zeros(padded_BCNN: torch.Tensor) -> bool:
    """Whether a plane lies as layout.py says, its last entries finite and zeros behind each row."""
    return is_padded(padded_BCNN) and bool(padded_BCNN.isfinite().all()) and not behind_rows(padded_BCNN).any()


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("shape", "with_residual", "dtype"),
    long_where(
        lambda shape, with_residual, dtype: with_residual != (dtype == torch.float32),
        product([(2, 3, 35, 5), (1, 2, 64, 35)], [False, True], TOLERANCE),
    ),
)
def test_maps_and_gradients_equal_eager(shape, with_residual, dtype, device):
    leaves = inputs(shape, dtype, device)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    direction = torch.randn(*shape[:3], shape[2], device=device).to(dtype)
    results = []
    for (q, k, residual), make in ((leaves, triton.make_map), (doubles, make_map)):
        out = make(DeferredMap(q, k, SCALE), residual if with_residual else None)
        wanted = [q, k, residual][: 2 + with_residual]
        results.append([out.detach(), *torch.autograd.grad(out, wanted, direction.to(out.dtype))])
    errors = [error(*pair) for pair in zip(*results, strict=True)]
    assert results[0][0].dtype == dtype
    assert max(errors) < TOLERANCE[dtype], errors


def test_dropout_drops_the_same_entries_forward_and_back(device):
    q, k, residual = inputs((2, 2, 35, 8), torch.float32, device)
    torch.manual_seed(1)
    made = triton.make_map(DeferredMap(q, k, SCALE, 0.25), residual)
    torch.manual_seed(1)
    assert torch.equal(made, triton.make_map(DeferredMap(q, k, SCALE, 0.25), residual))
    kept = (made != 0).float()
    assert 0.7 < kept.mean() < 0.8
    assert not torch.equal(kept[0, 0], kept[0, 1])
    whole = triton.make_map(DeferredMap(q, k, SCALE), residual)
    torch.testing.assert_close(made, whole * kept / 0.75)
    direction = torch.randn_like(made)
    ours = torch.autograd.grad(made, [q, k, residual], direction)
    truth = torch.autograd.grad(whole, [q, k, residual], direction * kept / 0.75)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.equal(made, triton.make_map(DeferredMap(q, k, SCALE, 0.25), residual))
    assert not triton.make_map(DeferredMap(q, k, SCALE, 1.0), residual).any()


def test_queries_keys_and_a_number_a_row_are_saved(device):
    def forward(batch):
        q, k, residual = inputs((batch, 3, 20, 16), torch.bfloat16, device)
        return triton.make_map(DeferredMap(q, k, SCALE), residual)

    one, two = (saved_bytes(lambda batch=batch: forward(batch), torch.nn.Module()) for batch in (1, 2))
    assert two - one == 2 * 2 * 3 * 20 * 16 + 4 * 3 * 20


@pytest.mark.parametrize(
    ("tokens", "dropout"), long_where(lambda *case: case in ((35, 0.25), (40, 0.0)), product([35, 40], [0.0, 0.25]))
)
def test_maps_and_gradients_passed_on_lie_with_zeros_behind_rows(tokens, dropout, device, memory_full_of_nan):
    q, k, residual = (x.detach() for x in inputs((2, 2, tokens, 5), torch.bfloat16, device))
    made, lse = triton_kernels.softmax_map(q, k, SCALE, residual, dropout)
    *others, d_residual = triton_kernels.score_gradients(q, k, lse, SCALE, residual, torch.float16, dropout)
    assert ends_in_zeros(made) and ends_in_zeros(d_residual) and d_residual.dtype == torch.float16
    assert all(x.isfinite().all() for x in (lse, *others))


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_gradient_is_read_where_it_lies(device, memory_full_of_nan):
    """Dense, as autograd adds up, or laid out, as kernels write; behind rows e⁰ over a tiny sum is no number."""
    q, k, residual = (x.detach() for x in inputs((2, 2, 35, 5), torch.float32, device))
    lse = triton_kernels.softmax_map(q, k - 40, 8.0)[1]
    dense = torch.randn_like(residual)
    copies = [
        triton_kernels.score_gradients(q, k - 40, lse, 8.0, grad, torch.float32) for grad in (dense, to_padded(dense))
    ]
    assert all(torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(*copies, strict=True))
