"""The backend "tiled": expanded maps are made and forgotten in tiles of query rows; none is saved, or ever whole."""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.backends import unsupported_call
from refiner_ds.attention.map import tiled as map_tiled
from refiner_ds.attention.refiners import implementation, refiner_of
from refiner_ds.attention.weights import Case, DeferredMap

__all__ = ["TiledBackend"]


class TiledBackend:
    """See :class:`refiner_ds.attention.backends.Backend`."""

    name = "tiled"

    def runs_on(self, device: torch.device) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        if (reason := unsupported_call(case)) is not None:
            return reason
        if case.weights is None:
            return None
        tiled = implementation(case.weights, self.name)
        return f"{refiner_of(case.weights).name} has no tiled implementation" if tiled is None else tiled.supports(case)

    def make_map(self, deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
        return map_tiled.make_map(deferred, residual_BHNN)

    def attend(
        self, deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        map_BHNN = map_tiled.make_map(deferred, residual_BHNN).to(value_BHNd.dtype)
        return map_tiled.attend(map_BHNN, value_BHNd), map_BHNN

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        assert case.weights is not None
        tiled = implementation(case.weights, self.name)
        assert tiled is not None
        return tiled.refine(case, scale, save_for_backward)
