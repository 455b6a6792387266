"""The released refiner in training: its passes as kernels, for ``bottleneck_function``.

    bottleneck_forward.py    A ─> h2 ─> h3 ─> A·V refined      moments.py    mean and covariance of A
    bottleneck_backward.py, bottleneck_backward_first.py       the four passes back

h2 and h3 are written, one layer's at a time and in the maps' dtype, and backward one more expanded stack; u1, u2, T and
their gradients never are.
Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention.bottleneck_algebra import Affine, Algebra
from refiner_ds.attention.fused import bottleneck_backward as back
from refiner_ds.attention.fused.bottleneck_backward_first import first
from refiner_ds.attention.fused.bottleneck_forward import expand_local, output, project
from refiner_ds.attention.fused.layout import laid_out
from refiner_ds.attention.fused.moments import map_moments

__all__ = ["KernelPasses"]


class KernelPasses:
    """All passes by kernels, forward and back; see ``bottleneck_function.Passes`` for each.

    Args:
        map_BHNN: the maps, fp32 or half precision, on a device kernels run on.
        algebra: the norms, folded as far as each pass needs them.
    """

    def __init__(self, map_BHNN: Tensor, algebra: Algebra) -> None:
        self.map_BHNN, self.algebra = laid_out(map_BHNN), algebra
        self.kernel_E1kk = algebra.refiner.local.kernels[0]
        self.project_HE = algebra.refiner.project_HE

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Forward 1: mean and covariance of A over heads, [H] and [H, H]."""
        return map_moments(self.map_BHNN)

    def local_maps(self, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward 2: h2, [B, E, N, N], and its mean and variance, which cost nothing more."""
        algebra = self.algebra
        local_BENN, mean_E, variance_E = expand_local(
            self.map_BHNN, algebra.folded_EH, algebra.shift1_E, self.kernel_E1kk
        )
        assert local_BENN is not None
        return local_BENN, (mean_E, variance_E)

    def narrow_maps(self, local_BENN: Tensor, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward 3: h3, [B, H, N, N], and its mean and covariance with A, which cost nothing more."""
        algebra = self.algebra
        narrow_BHNN, *moments = project(local_BENN, self.map_BHNN, algebra.gain2_E, algebra.shift2_E, self.project_HE)
        return narrow_BHNN, (moments[0], moments[1])

    def output(self, narrow_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Forward 4: refined maps times values, [B, H, N, d]."""
        algebra = self.algebra
        return output(narrow_BHNN, self.map_BHNN, algebra.alpha_H, algebra.beta_H, algebra.gamma_H, value_BHNd)

    def last(self, stacks: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor) -> tuple[Tensor, ...]:
        """Backward 1: the gradient of the values, and three sums, [H]; ∂T is kept until the last pass."""
        self.local_BENN, self.narrow_BHNN = stacks
        algebra = self.algebra
        d_value_BHNd, self.dt_BHNN, *sums = back.last_sums(
            self.map_BHNN, self.narrow_BHNN, value_BHNd, grad_BHNd,
            algebra.alpha_H, algebra.beta_H, algebra.gamma_H, algebra.mean3_H, algebra.mean_H,
        )  # fmt: skip
        return d_value_BHNd, *sums

    def second(self, to_narrow: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 2: ∂project, and the sums of m2 and m2·(h2 − μ2)."""
        self.to_map, algebra = to_map, self.algebra
        self.m2_BENN, *found = back.second(
            self.map_BHNN, self.narrow_BHNN, self.dt_BHNN, self.local_BENN, to_narrow,
            algebra.gain2_E, algebra.shift2_E, algebra.mean2_E, self.project_HE,
        )  # fmt: skip
        return found[0], found[1], found[2]

    def first(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 3: ∂kernel, and the sums of m1 and m1·(A − μ)ᵀ."""
        algebra = self.algebra
        self.share_BHNN, *found = first(
            self.map_BHNN, self.local_BENN, self.m2_BENN, algebra.folded_EH, algebra.shift1_E, self.kernel_E1kk,
            algebra.gain2_E, slope_E, level_E, algebra.mean_H,
        )  # fmt: skip
        return found[0], found[1], found[2]

    def through_statistics(self, pull_HH: Tensor, level_H: Tensor) -> Tensor:
        """Backward 4: the gradient of the map, [B, H, N, N]."""
        return back.through_statistics(
            self.map_BHNN, self.narrow_BHNN, self.dt_BHNN, self.share_BHNN, self.to_map, pull_HH, level_H
        )
