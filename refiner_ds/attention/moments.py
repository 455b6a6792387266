"""Means and comoments of parts, combined in float64, so that the cut into parts leaves no trace in a statistic.

    part ── fp32 mean and centred products ──> mean, covariance over all parts

The parallel formula of Chan, Golub and LeVeque (1979): comoments add up, and with them the products of the distances of
the parts' means from the whole's. Parts come one after the other (`Moments`: tiles), or all at once, with one count for
all quantities (`combine`: programs of a kernel) or one for each map (`combine_each`): on a GPU one product over many
parts is much faster than a loop. tests/attention/test_moments.py holds the three to the same result.

Axes: P parts, K quantities measured together, C maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments", "combine", "combine_each"]


class Moments:
    """Mean and covariance of K quantities of each of C maps, over the parts added so far."""

    def __init__(self, quantities: int, maps: int, device: torch.device) -> None:
        self.count = 0
        self.mean_KC = torch.zeros(quantities, maps, dtype=torch.float64, device=device)
        self._comoment_KKC = torch.zeros(quantities, quantities, maps, dtype=torch.float64, device=device)

    def add(self, count: int, mean_KC: Tensor, comoment_KKC: Tensor) -> None:
        """Take in ``count`` entries a map with their means and sums of products about those means."""
        if count == 0:
            return
        before, self.count = self.count, self.count + count
        shift_KC = mean_KC.double() - self.mean_KC
        self.mean_KC += shift_KC * (count / self.count)
        products_KKC = shift_KC[:, None] * shift_KC[None, :]
        self._comoment_KKC += comoment_KKC.double() + products_KKC * (before * count / self.count)

    @property
    def covariance_KKC(self) -> Tensor:
        """Biased covariances, [K, K, C]."""
        return self._comoment_KKC / max(self.count, 1)


def combine(counts_P: Tensor, means_PK: Tensor, comoments_PKK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance over all P parts, float64.

    Args:
        counts_P: entries of each part.
        means_PK, comoments_PKK: means of K quantities, and sums of products about those means.
    Returns:
        [K] and [K, K].
    """
    total = counts_P.sum().clamp(min=1)  # of nothing but padding there is none
    share_P = counts_P.double() / total
    mean_K = share_P @ means_PK.double()
    apart_PK = means_PK.double() - mean_K
    return mean_K, comoments_PKK.double().sum(0) / total + (apart_PK * share_P[:, None]).mT @ apart_PK


def combine_each(counts_PC: Tensor, means_PKC: Tensor, comoments_PKKC: Tensor) -> tuple[Tensor, Tensor]:
    """The same for K quantities of each of C maps by itself, float64.

    Args:
        counts_PC: entries of each map in each part.
        means_PKC, comoments_PKKC: means of the quantities, and sums of products about those means.
    Returns:
        [K, C] and [K, K, C].
    """
    total_C = counts_PC.sum(0, dtype=torch.float64).clamp(min=1)
    share_PC = counts_PC.double() / total_C
    mean_KC = (share_PC[:, None] * means_PKC).sum(0)
    apart_PKC = means_PKC - mean_KC
    between_KKC = torch.einsum("pc,pkc,plc->klc", share_PC, apart_PKC, apart_PKC)
    return mean_KC, comoments_PKKC.double().sum(0) / total_C + between_KKC
