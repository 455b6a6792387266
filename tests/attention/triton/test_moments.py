"""One pass over maps measures what two passes in float64 do."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention.kernels import moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(2, 3, 7), (1, 12, 19), (2, 17, 24)])
def test_mean_and_covariance_of_maps_in_one_pass(batch, heads, tokens, dtype, device, monkeypatch):
    monkeypatch.setattr(moments, "STEPS", 2)
    map_BHNN = (torch.randn(batch, heads, tokens, tokens) * 0.01 + torch.rand(heads, 1, 1)).to(device, dtype)
    mean_H, covariance_HH = moments.map_moments(map_BHNN)
    flat_HL = map_BHNN.double().transpose(0, 1).flatten(1)
    assert (mean_H - flat_HL.mean(1)).abs().max() < 1e-7
    # Half precision multiplies in two pieces, which the interpreter cuts off where a GPU rounds.
    allowed = 1e-5 if dtype == torch.float32 else 5e-5
    assert (covariance_HH - flat_HL.cov(correction=0)).abs().max() < allowed * covariance_HH.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_padded_sequences_real_entries_are_measured_as_precisely(dtype, device, monkeypatch):
    """Far from zero, so that a part that begins with padding needs a pilot of its own."""
    monkeypatch.setattr(moments, "STEPS", 4)
    monkeypatch.setattr(moments, "POSITIONS", 16)
    mask_BN = torch.arange(40).ge(torch.tensor([[25], [0], [40]])).to(device)
    real_BNN = mask_BN[:, :, None] & mask_BN[:, None]
    map_BHNN = (torch.randn(3, 2, 40, 40) * 0.01 + torch.rand(2, 1, 1)).to(device, dtype) * real_BNN[:, None]
    mean_H, covariance_HH = moments.map_moments(map_BHNN, mask_BN)
    flat_HL = map_BHNN.double().transpose(0, 1)[:, real_BNN]
    assert (mean_H - flat_HL.mean(1)).abs().max() < 1e-7
    allowed = 1e-5 if dtype == torch.float32 else 5e-5
    assert (covariance_HH - flat_HL.cov(correction=0)).abs().max() < allowed * covariance_HH.abs().max()
