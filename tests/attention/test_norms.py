"""The batch norm: PyTorch's in fp32, fp32 statistics in every precision, no counting while frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refiner_ds.attention import BatchNorm, frozen_statistics


def test_in_fp32_it_is_pytorchs_own_to_the_bit():
    ours, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    for mode in (True, False):
        x = torch.randn(3, 5, 4, 4)
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_modules_keep_fp32_statistics_untouched(half):
    norm = BatchNorm(5)
    norm(torch.randn(3, 5, 4, 4))
    before = norm.running_mean.clone()
    norm.to(half)
    assert norm.weight.dtype == half
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_input_is_normalised_in_fp32(half, training):
    """A map with a mean far above its spread: half-precision sums would lose the spread altogether."""
    x = (0.5 + 0.01 * torch.randn(8, 5, 32, 32)).to(half)
    ours, exact = BatchNorm(5).train(training).to(half), nn.BatchNorm2d(5).train(training)
    out, truth = ours(x), exact(x.float())
    assert out.dtype == half
    torch.testing.assert_close(out.float(), truth, rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours.running_mean, exact.running_mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.running_var, exact.running_var, rtol=1e-5, atol=1e-7)


def test_double_modules_stay_double():
    norm = BatchNorm(5).double()
    assert norm(torch.randn(3, 5, 4, 4).double()).dtype == norm.running_var.dtype == torch.float64


def test_frozen_statistics_change_nothing_but_the_counting():
    norm = BatchNorm(5)
    x = torch.randn(3, 5, 4, 4)
    counted = norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with frozen_statistics():
        assert torch.equal(norm(x), counted)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert norm.num_batches_tracked == 2
