"""The released refiner by tiles."""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention.bottleneck.cases import refine_case, unsupported_case
from refiner_ds.attention.map.tiled import make_map
from refiner_ds.attention.weights import Case

__all__ = ["refine", "supports"]


def supports(case: Case) -> str | None:
    """The reason why this case is left to the eager backend, or ``None``."""
    return unsupported_case(case)


def refine(case: Case, scale: float, save_for_backward: str) -> Tensor:
    """Refined maps times values, [B, H, N, d] in the values' dtype."""
    return refine_case("tiled", make_map, case, scale, save_for_backward)
