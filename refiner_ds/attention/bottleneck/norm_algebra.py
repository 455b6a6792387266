"""The four norms of the released refiner, differentiated by hand: the coefficients of each pass over the maps.

    A ─ expand, norm 1, relu6 ─ local ─> h2 ─ norm 2, relu6 ─ reduce ─> h3 ─ norm 3, + A, norm 4 ─> T ─ · V ─> out

Forward, every norm folds into its neighbours once its statistics are known:

    u1 = relu6(folded·A + shift1)    u2 = relu6(gain2·h2 + shift2)    T = α·h3 + β·A + γ

Backward, with x̂ = (x − μ)·i, the gradient g after a norm becomes γ·i·(g − mean(g) − x̂·mean(g·x̂)) before it. Each of
these means is a sum over all positions, known only when a pass is over. In the names below t, q and p are such sums for
norms 3 and 4, for norm 2 and for norm 1. Everything here is as small as the weights, and float64.
Axes: H heads, E expanded maps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from refiner_ds.attention.norms import fold_norm
from refiner_ds.attention.weights import BottleneckWeights

__all__ = ["Affine", "NormAlgebra", "Statistics"]

# Coefficients of ∂T, h3 and A for each head, and a constant.
Affine = tuple[Tensor, Tensor, Tensor, Tensor]


class Statistics(NamedTuple):
    """Statistics of a batch, float64: A's mean and covariance over heads, then moments of h2 and h3.

    ``joint_22H`` is the covariance of (h3, A) within each head.
    """

    mean_H: Tensor
    covariance_HH: Tensor
    mean2_E: Tensor
    variance2_E: Tensor
    mean3_H: Tensor
    joint_22H: Tensor


class NormAlgebra:
    """The norms of one refinement; each method needs the ones above it.

    Args:
        weights: with their norms.
        scale: factor on the refined maps.
        count: entries of one map over the batch, B·N²; under a mask those that are real, in a float64 tensor.
    """

    def __init__(self, weights: BottleneckWeights, scale: float, count: int | Tensor) -> None:
        self.weights, self.scale, self.count = weights, scale, count
        self._expand_EH = weights.expand_EH.double()

    # -- forward -----------------------------------------------------------------------------------------------------

    def fold_norm1(self, mean_H: Tensor, covariance_HH: Tensor) -> None:
        """Norm 1, whose statistics follow from A's: sets ``folded_EH`` and ``shift1_E``."""
        self.mean_H, self.covariance_HH, expand_EH = mean_H, covariance_HH, self._expand_EH
        self.moments1 = expand_EH @ mean_H, ((expand_EH @ covariance_HH) * expand_EH).sum(1).clamp(min=0)
        self.gain1_E, self.inverse1_E = fold_norm(self.weights.norm1_E, *self.moments1)
        self.folded_EH = self.gain1_E[:, None] * expand_EH
        self.shift1_E = self.weights.norm1_E.bias.double() - self.folded_EH @ mean_H

    def fold_norm2(self, mean2_E: Tensor, variance2_E: Tensor) -> None:
        """Norm 2: sets ``gain2_E`` and ``shift2_E``."""
        self.mean2_E = mean2_E
        self.gain2_E, self.inverse2_E = fold_norm(self.weights.norm2_E, mean2_E, variance2_E)
        self.shift2_E = self.weights.norm2_E.bias.double() - self.gain2_E * mean2_E

    def fold_norms34(self, mean3_H: Tensor, joint_22H: Tensor) -> None:
        """Norms 3 and 4: sets ``alpha_H``, ``beta_H`` and ``gamma_H``."""
        self.mean3_H, self.joint_22H = mean3_H, joint_22H
        variance3_H, cross_H, variance_H = joint_22H[0, 0], joint_22H[0, 1], joint_22H[1, 1]
        self.kappa_H, self.inverse3_H = fold_norm(self.weights.norm3_H, mean3_H, variance3_H)
        variance4_H = self.kappa_H.square() * variance3_H + 2 * self.kappa_H * cross_H + variance_H
        self.moments4 = self.weights.norm3_H.bias.double() + self.mean_H, variance4_H
        gain_H, self.inverse4_H = fold_norm(self.weights.adapt_H, self.moments4[0], variance4_H.clamp(min=0))
        self.beta_H = self.scale * gain_H
        self.alpha_H = self.beta_H * self.kappa_H
        shift_H = self.scale * self.weights.adapt_H.bias.double()
        self.gamma_H = shift_H - self.alpha_H * mean3_H - self.beta_H * self.mean_H

    def fold(self, statistics: Statistics) -> None:
        """All four norms, from known statistics."""
        self.fold_norm1(statistics.mean_H, statistics.covariance_HH)
        self.fold_norm2(statistics.mean2_E, statistics.variance2_E)
        self.fold_norms34(statistics.mean3_H, statistics.joint_22H)

    # -- backward ----------------------------------------------------------------------------------------------------

    def backward_norms34(self, t0_H: Tensor, t1_H: Tensor, t2_H: Tensor) -> tuple[Affine, Affine]:
        """Coefficients of ∂T, h3 and A in ∂h3, and in the direct share of ∂A.

        Args:
            t0_H, t1_H, t2_H: sums of ∂T, ∂T·(h3 − μ3) and ∂T·(A − μ).
        """
        kappa_H, beta_H, joint_22H = self.kappa_H, self.beta_H, self.joint_22H
        inside_H = kappa_H * t1_H + t2_H
        t_H = inside_H * self.inverse4_H.square() / self.count
        w_H = beta_H * (t1_H - t_H * self.count * (kappa_H * joint_22H[0, 0] + joint_22H[0, 1]))
        a2_H = -kappa_H * (beta_H * kappa_H * t_H + w_H * self.inverse3_H.square() / self.count)
        a1_H = kappa_H * beta_H
        # Norm 4 subtracts whatever norm 3's bias adds: that bias has no gradient at all.
        norm3 = [w_H * self.inverse3_H, zeros_like(w_H)]
        self._last_gradients = [*norm3, self.scale * self.inverse4_H * inside_H, self.scale * t0_H]
        return (
            self._affine(a1_H, a2_H, -a1_H * t_H, t0_H),
            self._affine(beta_H, -a1_H * t_H, -beta_H * t_H, t0_H),
        )

    def _affine(self, gain_H: Tensor, on_reduced_H: Tensor, map_H: Tensor, t0_H: Tensor) -> Affine:
        """gain·(∂T − mean) + reduce·(h3 − μ3) + map·(A − μ), as what multiplies ∂T, h3 and A, and what is added."""
        level_H = -gain_H * t0_H / self.count
        return gain_H, on_reduced_H, map_H, level_H - on_reduced_H * self.mean3_H - map_H * self.mean_H

    def backward_norm2(self, q0_E: Tensor, q1_E: Tensor) -> tuple[Tensor, Tensor]:
        """slope and level of ∂h2 = gain2·m2 + slope·h2 + level, where m2 is the gradient after norm 2.

        Args:
            q0_E, q1_E: sums of m2 and of m2·(h2 − μ2).
        """
        self._second_gradients = [q1_E * self.inverse2_E, q0_E]
        slope_E = -self.gain2_E * q1_E * self.inverse2_E.square() / self.count
        return slope_E, -self.gain2_E * q0_E / self.count - slope_E * self.mean2_E

    def backward_norm1(self, p0_E: Tensor, cross_EH: Tensor) -> tuple[Tensor, Tensor]:
        """pull and level of the share pull·A + level of ∂A that comes through the statistics of norm 1.

        Args:
            p0_E: the sum of m1, the gradient after norm 1.
            cross_EH: m1·(A − μ)ᵀ, summed over all positions.
        """
        expand_EH, count = self._expand_EH, self.count
        p1_E = (expand_EH * cross_EH).sum(1)
        pulled_E = p1_E * self.inverse1_E.square()
        self.d_expand_EH = self.gain1_E[:, None] * (cross_EH - pulled_E[:, None] * (expand_EH @ self.covariance_HH))
        self._first_gradients = [p1_E * self.inverse1_E, p0_E]
        gain_HH = -(expand_EH.T * (self.gain1_E * pulled_E / count)) @ expand_EH
        return gain_HH, -expand_EH.T @ (self.gain1_E * p0_E) / count - gain_HH @ self.mean_H

    def norm_gradients(self) -> list[Tensor]:
        """Weight and bias of norms 1, 2, 3 and 4."""
        return [*self._first_gradients, *self._second_gradients, *self._last_gradients]
