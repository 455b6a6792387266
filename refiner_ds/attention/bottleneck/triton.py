"""The released refiner by kernels."""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention.bottleneck.cases import refine_case, unsupported_case
from refiner_ds.attention.kernels.launch import unsupported_kernel_size
from refiner_ds.attention.map.triton import make_map
from refiner_ds.attention.weights import BottleneckWeights, Case, FoldedWeights

__all__ = ["refine", "supports"]


def supports(case: Case) -> str | None:
    """The reason why this case is left to another backend, or ``None``."""
    assert isinstance(case.weights, BottleneckWeights | FoldedWeights)
    return unsupported_case(case) or unsupported_kernel_size(case.weights.local)


def refine(case: Case, scale: float, save_for_backward: str) -> Tensor:
    """Refined maps times values, [B, H, N, d] in the values' dtype."""
    return refine_case("triton", make_map, case, scale, save_for_backward)
