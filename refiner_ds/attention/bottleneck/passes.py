"""What a training step of the released refiner does with maps: four passes forward, and four backward.

    norm_algebra.py    the four norms, folded and differentiated by hand
    Passes             the passes of one backend: tiled_*.py or triton_passes.py

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

from refiner_ds.attention.bottleneck.norm_algebra import Affine, NormAlgebra, Statistics

__all__ = ["Passes", "backward_passes", "forward_passes", "passes_of"]

Moments = tuple[Tensor, Tensor]


class Passes(Protocol):
    """The passes over the maps of one refinement. Sums and moments are those of the whole batch, in float64.

    The activations h2 and h3 are in the map's dtype; h2 in whichever memory layout the backend likes.
    """

    def __init__(self, map_BHNN: Tensor, algebra: NormAlgebra, mask_BN: Tensor | None = None) -> None: ...

    def map_moments(self) -> Moments:
        """Forward 1: mean and covariance of A over heads, [H] and [H, H]."""

    def expand_local(self) -> tuple[Tensor, Moments]:
        """Forward 2: h2, and its mean and variance, [E] each."""

    def reduce(self, local_BENN: Tensor) -> tuple[Tensor, Moments]:
        """Forward 3: h3, and its mean [H] and the covariance of (h3, A) within each head, [2, 2, H]."""

    def output(self, reduced_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Forward 4: refined maps times values, [B, H, N, d]."""

    def recompute(self) -> tuple[Tensor, Tensor]:
        """h2 and h3 again, in backward."""

    def bwd_output(
        self, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward 1: ∂V, and the sums of ∂T, ∂T·(h3 − μ3) and ∂T·(A − μ), [H] each."""

    def bwd_reduce(self, to_reduced: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 2: ∂reduce, and the sums of m2 and m2·(h2 − μ2), [E] each; m2 is the gradient after norm 2."""

    def bwd_expand_local(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 3: ∂kernel, the sum of m1 [E], and m1·(A − μ)ᵀ [E, H]; m1 is the gradient after norm 1."""

    def bwd_map_statistics(self, gain_HH: Tensor, level_H: Tensor) -> Tensor:
        """Backward 4: ∂A, [B, H, N, N]."""


def passes_of(backend: str) -> type[Passes]:
    """The passes of "tiled" or "triton"; Triton is imported where it is asked for."""
    module, name = {"tiled": ("tiled_backward", "TiledPasses"), "triton": ("triton_passes", "KernelPasses")}[backend]
    return getattr(import_module(f"refiner_ds.attention.bottleneck.{module}"), name)


def forward_passes(passes: Passes, algebra: NormAlgebra) -> tuple[Statistics, Tensor, Tensor]:
    """The batch's statistics, and the activations h2 and h3."""
    moments = passes.map_moments()
    algebra.fold_norm1(*moments)
    local_BENN, moments2 = passes.expand_local()
    algebra.fold_norm2(*moments2)
    reduced_BHNN, moments3 = passes.reduce(local_BENN)
    algebra.fold_norms34(*moments3)
    return Statistics(*moments, *moments2, *moments3), local_BENN, reduced_BHNN


def backward_passes(
    passes: Passes, algebra: NormAlgebra, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
) -> list[Tensor]:
    """Gradients of map, value, expansion, kernel, reduction, and weight and bias of the four norms, in this order."""
    d_value_BHNd, *sums = passes.bwd_output(activations, value_BHNd, grad_BHNd)
    d_reduce_HE, q0_E, q1_E = passes.bwd_reduce(*algebra.backward_norms34(*sums))
    d_kernel_E1kk, p0_E, cross_EH = passes.bwd_expand_local(*algebra.backward_norm2(q0_E, q1_E))
    d_map_BHNN = passes.bwd_map_statistics(*algebra.backward_norm1(p0_E, cross_EH))
    weights = algebra.d_expand_EH, d_kernel_E1kk, d_reduce_HE
    return [d_map_BHNN, d_value_BHNd, *weights, *algebra.norm_gradients()]
