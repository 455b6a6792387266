"""The passes over the maps of the released refiner in training, by kernels, for passes.py.

    triton_forward.py                             A ──> h2 ──> h3 ──> refined A·V
    triton_backward.py, triton_backward_local.py  the four passes backward

h2 and h3 are written, one layer's at a time and in the map's dtype, and in backward one more expanded activation; u1,
u2, T and their gradients never are.
Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention.bottleneck import triton_backward, triton_forward
from refiner_ds.attention.bottleneck.norm_algebra import Affine, NormAlgebra
from refiner_ds.attention.bottleneck.triton_backward_local import bwd_expand_local
from refiner_ds.attention.kernels.moments import map_moments
from refiner_ds.attention.kernels.padded import to_padded

__all__ = ["KernelPasses"]


class KernelPasses:
    """All passes by kernels; see :class:`refiner_ds.attention.bottleneck.passes.Passes`.

    Args:
        map_BHNN: the maps, fp32 or half precision, on a device that runs kernels; in the interpreter float64 too.
        algebra: the norms, folded as far as each pass needs them.
        mask_BN: which tokens are real; maps, values and ∂out of the others are zero. h2, h3, ∂T and m2 are then written
            as zero too; the output of padding, and ∂A and ∂V of it, are any numbers.
    """

    def __init__(self, map_BHNN: Tensor, algebra: NormAlgebra, mask_BN: Tensor | None = None) -> None:
        self.map_BHNN, self.algebra, self.mask_BN = to_padded(map_BHNN), algebra, mask_BN
        self.kernel_E1kk = algebra.weights.local.kernels[0]
        self.reduce_HE = algebra.weights.reduce_HE

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Forward 1: mean and covariance of A over heads, [H] and [H, H]."""
        return map_moments(self.map_BHNN, self.mask_BN)

    def expand_local(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward 2: h2, [B, E, N, N], and its mean and variance."""
        algebra = self.algebra
        local_BENN, mean_E, variance_E = triton_forward.expand_local(
            self.map_BHNN, algebra.folded_EH, algebra.shift1_E, self.kernel_E1kk, self.mask_BN
        )
        return local_BENN, (mean_E, variance_E)

    def reduce(self, local_BENN: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward 3: h3, [B, H, N, N], and its mean and covariance with A."""
        algebra = self.algebra
        reduced_BHNN, mean3_H, joint_22H = triton_forward.reduce(
            local_BENN, self.map_BHNN, algebra.gain2_E, algebra.shift2_E, self.reduce_HE, self.mask_BN
        )
        return reduced_BHNN, (mean3_H, joint_22H)

    def recompute(self) -> tuple[Tensor, Tensor]:
        """h2 and h3 again; measuring them costs nothing more."""
        local_BENN, _ = self.expand_local()
        return local_BENN, self.reduce(local_BENN)[0]

    def output(self, reduced_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Forward 4: refined maps times values, [B, H, N, d]."""
        algebra = self.algebra
        return triton_forward.output(
            reduced_BHNN, self.map_BHNN, algebra.alpha_H, algebra.beta_H, algebra.gamma_H, value_BHNd
        )

    def bwd_output(
        self, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward 1: ∂V, and three sums, [H]; ∂T is held until the last pass."""
        self.local_BENN, self.reduced_BHNN = activations
        algebra = self.algebra
        d_value_BHNd, self.dt_BHNN, t0_H, t1_H, t2_H = triton_backward.bwd_output(
            self.map_BHNN, self.reduced_BHNN, value_BHNd, grad_BHNd,
            algebra.alpha_H, algebra.beta_H, algebra.gamma_H, algebra.mean3_H, algebra.mean_H,
        )  # fmt: skip
        return d_value_BHNd, t0_H, t1_H, t2_H

    def bwd_reduce(self, to_reduced: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 2: ∂reduce, and the sums of m2 and m2·(h2 − μ2)."""
        self.to_map, algebra = to_map, self.algebra
        self.m2_BENN, d_reduce_HE, q0_E, q1_E = triton_backward.bwd_reduce(
            self.map_BHNN, self.reduced_BHNN, self.dt_BHNN, self.local_BENN, to_reduced,
            algebra.gain2_E, algebra.shift2_E, algebra.mean2_E, self.reduce_HE, self.mask_BN,
        )  # fmt: skip
        return d_reduce_HE, q0_E, q1_E

    def bwd_expand_local(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward 3: ∂kernel, and the sums of m1 and m1·(A − μ)ᵀ."""
        algebra = self.algebra
        self.share_BHNN, d_kernel_E1kk, p0_E, cross_EH = bwd_expand_local(
            self.map_BHNN, self.local_BENN, self.m2_BENN, algebra.folded_EH, algebra.shift1_E, self.kernel_E1kk,
            algebra.gain2_E, slope_E, level_E, algebra.mean_H, self.mask_BN,
        )  # fmt: skip
        return d_kernel_E1kk, p0_E, cross_EH

    def bwd_map_statistics(self, gain_HH: Tensor, level_H: Tensor) -> Tensor:
        """Backward 4: ∂A, [B, H, N, N]."""
        return triton_backward.bwd_map_statistics(
            self.map_BHNN, self.reduced_BHNN, self.dt_BHNN, self.share_BHNN, self.to_map, gain_HH, level_H
        )
