"""The way back of bottleneck_forward.py: four passes over tiles, and one expanded work buffer.

    1  ∂V, and the sums that norms 3 and 4 need                       from ∂out, h3 and A
    2  ∂project, the sums that norm 2 needs, and m2, the gradient     from h2; m2 is the work buffer
       behind it; the direct share of ∂A
    3  ∂kernel, the sums that norm 1 needs, expanded share of ∂A      from m2, h2 and A
    4  the share of ∂A that reaches it through norm 1's statistics    from A

Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck_algebra import Affine
from refiner_ds.attention.bottleneck_forward import ForwardPasses
from refiner_ds.attention.lean_steps import affine, combine, correlate, gradient_sums, narrow, total, widen
from refiner_ds.attention.tiles import Tile, convolution_gradients

__all__ = ["TiledPasses"]


class TiledPasses(ForwardPasses):
    """All passes over tiles, forward and back; see ``bottleneck_function.Passes`` for each."""

    def last(self, stacks: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor) -> tuple[Tensor, ...]:
        """Pass 1: the gradient of the values, [B, H, N, d], and three sums, [H]."""
        self.local_BENN, self.narrow_BHNN = stacks
        self.value_BHNd, self.grad_BHNd = value_BHNd.to(self.precision), grad_BHNd.to(self.precision)
        d_value_BHNd = torch.zeros_like(value_BHNd, dtype=self.precision)
        norms = self.last_norms()
        sums_3H = torch.zeros(3, self.heads, dtype=torch.float64, device=d_value_BHNd.device)
        for tile in self.tiles():
            dt_bHRN, narrow_bHRN, map_bHRN = self._narrow_parts(tile)
            refined_bHRN = self.refined(norms, narrow_bHRN, map_bHRN)
            d_value_BHNd[tile.images] += refined_bHRN.mT @ self.grad_BHNd[tile.images, :, tile.rows]
            t0_H, t1_H = gradient_sums(dt_bHRN, narrow_bHRN, self.algebra.mean3_H)
            sums_3H += torch.stack((t0_H, t1_H, gradient_sums(dt_bHRN, map_bHRN, self.algebra.mean_H)[1]))
        return d_value_BHNd, *sums_3H

    def _narrow_parts(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of T, h3 and A, [b, H, R, N]."""
        dt_bHRN = self.grad_BHNd[tile.images, :, tile.rows] @ self.value_BHNd[tile.images].mT
        return dt_bHRN, self.read(self.narrow_BHNN, tile), self.read(self.map_BHNN, tile)

    def second(self, to_narrow: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 2: ∂project, and the sums of m2 and m2·(h2 − μ2)."""
        self.d_map_BHNN, self.m2_BENN = torch.empty_like(self.map_BHNN), self.wide_empty()
        d_project_HE = torch.zeros_like(self.project_HE, dtype=torch.float64)
        sums_2E = torch.zeros(2, self.expanded, dtype=torch.float64, device=d_project_HE.device)
        norm = self.second_norm()
        (*on_narrow, level3_H), (*on_map, level_H) = (self.exact(*affine) for affine in (to_narrow, to_map))
        for tile in self.tiles():
            parts = self._narrow_parts(tile)
            dh3_bHRN = combine(level3_H, *zip(parts, on_narrow, strict=True))
            self.d_map_BHNN[tile.images, :, tile.rows] = combine(level_H, *zip(parts, on_map, strict=True))
            local_bERN = self.read(self.local_BENN, tile)
            u2_bERN = affine(local_bERN, *norm).clamp_(0, 6)
            d_project_HE += correlate(dh3_bHRN, u2_bERN)
            m2_bERN = _gate(widen(dh3_bHRN, self.project_HE.T), u2_bERN)
            self.m2_BENN[tile.images, :, tile.rows] = m2_bERN
            sums_2E += torch.stack(gradient_sums(m2_bERN, local_bERN, self.algebra.mean2_E))
        return d_project_HE, *sums_2E

    def first(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 3: ∂kernel, and the sums of m1 and m1·(A − μ)ᵀ; adds to ∂A what m1 brings."""
        algebra, expansion = self.algebra, self.expansion()
        # The kernel takes the gain: ∂h2 = gain2·(m2 + slope/gain2·h2 + level/gain2), all of it zero where gain2 is.
        gain_E111 = algebra.gain2_E[:, None, None, None]
        kernel_E1kk = (self.kernel_E1kk * gain_E111).to(self.precision)
        slope_E, level_E = self.exact(*((x_E / algebra.gain2_E).nan_to_num(0, 0, 0) for x_E in (slope_E, level_E)))
        folded_HE, (mean_H,) = algebra.folded_EH.to(self.precision).T, self.exact(algebra.mean_H)
        d_kernel_E1kk = torch.zeros_like(self.kernel_E1kk, dtype=torch.float64)
        through_HE = torch.zeros_like(algebra.folded_EH.T)
        p0_E = through_HE.new_zeros(self.expanded)
        for tile in self.tiles(reach=True):
            dh2_bERN = affine(self.read(self.local_BENN, tile, tile.reach), slope_E, level_E)
            dh2_bERN += self.read(self.m2_BENN, tile, tile.reach)
            u1_bERN = self.activated(expansion, tile)
            du1_bERN, share_E1kk = convolution_gradients(u1_bERN, dh2_bERN, kernel_E1kk, tile, self.expanded)
            d_kernel_E1kk += share_E1kk
            m1_bERN = _gate(du1_bERN, u1_bERN[:, :, tile.inner])
            p0_E += total(m1_bERN)
            centred_bHRN = affine(self.read(self.map_BHNN, tile), None, -mean_H)
            through_HE += correlate(centred_bHRN, m1_bERN)
            self.d_map_BHNN[tile.images, :, tile.rows] += narrow(m1_bERN, folded_HE)
        return d_kernel_E1kk * gain_E111, p0_E, through_HE.T

    def through_statistics(self, pull_HH: Tensor, level_H: Tensor) -> Tensor:
        """Pass 4: one small matrix product on A, added to the other shares of ∂A."""
        pull_HH, level_H = self.exact(pull_HH, level_H)
        for tile in self.tiles():
            map_bHRN = self.read(self.map_BHNN, tile)
            share_bHL = torch.baddbmm(level_H[:, None], pull_HH.expand(len(map_bHRN), -1, -1), map_bHRN.flatten(2))
            self.d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
        return self.d_map_BHNN


def _gate(grad: Tensor, activated: Tensor) -> Tensor:
    """The gradient through relu6, zero where it is at either end."""
    return torch.ops.aten.hardtanh_backward(grad, activated, 0.0, 6.0)
