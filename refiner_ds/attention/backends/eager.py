"""The backend "eager": the equations under autograd, every map materialised. It computes every case."""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.map.eager import make_map
from refiner_ds.attention.refiners import refiner_of
from refiner_ds.attention.weights import Case, DeferredMap, RefinerWeights

__all__ = ["EagerBackend", "refined_map"]


def refined_map(map_BHNN: Tensor, weights: RefinerWeights, scale: float, mask_BN: Tensor | None = None) -> Tensor:
    """The map with which a refined block multiplies its values, [B, H, N, N] ([B, E, N, N] without reduction).

    Args:
        mask_BN: which tokens are real; maps of the others are zero already, and the refined ones must meet zero values.
    Raises:
        TypeError: the weights are of no known kind.
    """
    row = refiner_of(weights)
    return row.eager(map_BHNN, weights, scale) if mask_BN is None else row.eager(map_BHNN, weights, scale, mask_BN)


class EagerBackend:
    """See :class:`refiner_ds.attention.backends.Backend`."""

    name = "eager"

    def runs_on(self, device: torch.device) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        if case.weights is not None:
            refiner_of(case.weights)
        return None

    def make_map(self, deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
        return make_map(deferred, residual_BHNN)

    def attend(
        self, deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        map_BHNN = make_map(deferred, residual_BHNN).to(value_BHNd.dtype)
        return equations.attend(map_BHNN, value_BHNd), map_BHNN

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        attn, value_BHNd, weights, mask_BN = case
        assert weights is not None
        map_BHNN = make_map(attn).to(value_BHNd.dtype) if isinstance(attn, DeferredMap) else attn
        return equations.attend(refined_map(map_BHNN, weights, scale, mask_BN), value_BHNd)
