"""Means and comoments over tiles, combined in float64, so that the cut into tiles leaves no trace in a statistic.

    tile ── fp32 mean and centred products ──> Moments.add ──> mean, covariance over everything added

Axes: K quantities measured together, C maps, L entries of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Mean and covariance of K quantities of each of C maps, by the parallel formula (Chan et al., 1979)."""

    def __init__(self, quantities: int, maps: int, device: torch.device) -> None:
        self.count = 0
        self.mean_KC = torch.zeros(quantities, maps, dtype=torch.float64, device=device)
        self._comoment_KKC = torch.zeros(quantities, quantities, maps, dtype=torch.float64, device=device)

    def add(self, count: int, mean_KC: Tensor, comoment_KKC: Tensor) -> None:
        """Take in ``count`` entries a map with their means and sums of products about those means."""
        before, self.count = self.count, self.count + count
        shift_KC = mean_KC.double() - self.mean_KC
        self.mean_KC += shift_KC * (count / self.count)
        products_KKC = shift_KC[:, None] * shift_KC[None, :]
        self._comoment_KKC += comoment_KKC.double() + products_KKC * (before * count / self.count)

    @property
    def covariance_KKC(self) -> Tensor:
        """Biased covariances, [K, K, C]."""
        return self._comoment_KKC / self.count
