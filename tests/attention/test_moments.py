"""However data is cut into parts, its mean and covariance come out the same, by each form of the formula."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention.moments import Moments, combine, combine_each

QUANTITIES, MAPS = 3, 2


@pytest.mark.parametrize("sizes", [[40], [1, 39], [13, 7, 20], [5] * 8])
def test_parts_one_by_one_and_all_at_once_give_the_moments_of_the_whole(sizes: list[int]) -> None:
    whole_KCL = 100 + torch.randn(QUANTITIES, MAPS, sum(sizes)).double()  # far from zero: squares alone would not do
    means, comoments = [], []
    one_by_one = Moments(QUANTITIES, MAPS, torch.device("cpu"))
    for part_KCL in whole_KCL.split(sizes, -1):
        mean_KC = part_KCL.mean(-1)
        centred_KCL = part_KCL - mean_KC[..., None]
        comoment_KKC = torch.einsum("kcl,jcl->kjc", centred_KCL, centred_KCL)
        one_by_one.add(part_KCL.shape[-1], mean_KC, comoment_KKC)
        means.append(mean_KC)
        comoments.append(comoment_KKC)
    counts_P, means_PKC, comoments_PKKC = torch.tensor(sizes), torch.stack(means), torch.stack(comoments)
    each = combine_each(counts_P[:, None].expand(-1, MAPS), means_PKC, comoments_PKKC)
    for map_ in range(MAPS):
        truth_K, truth_KK = whole_KCL[:, map_].mean(-1), whole_KCL[:, map_].cov(correction=0)
        at_once = combine(counts_P, means_PKC[..., map_], comoments_PKKC[..., map_])
        for mean_K, covariance_KK in (
            (one_by_one.mean_KC[:, map_], one_by_one.covariance_KKC[..., map_]),
            (each[0][:, map_], each[1][..., map_]),
            at_once,
        ):
            torch.testing.assert_close(mean_K, truth_K, rtol=1e-13, atol=0)
            torch.testing.assert_close(covariance_KK, truth_KK, rtol=1e-11, atol=1e-12)
