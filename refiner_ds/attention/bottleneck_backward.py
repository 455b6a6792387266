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
from refiner_ds.attention.tiles import Tile, convolution_gradients

__all__ = ["TiledPasses"]


class TiledPasses(ForwardPasses):
    """All passes over tiles, forward and back; see ``bottleneck_function.Passes`` for each."""

    def last(self, stacks: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor) -> tuple[Tensor, ...]:
        """Pass 1: the gradient of the values, [B, H, N, d], and three sums, [H]."""
        self.local_BNNE, self.narrow_BHNN = stacks
        self.value_BHNd, self.grad_BHNd = value_BHNd, grad_BHNd
        d_value_BHNd = torch.zeros_like(value_BHNd, dtype=self.precision)
        sums_3H = torch.zeros(3, self.heads, dtype=torch.float64, device=d_value_BHNd.device)
        for tile in self.tiles():
            refined_bHRN, narrow_bHRN, map_bHRN = self.refined(self.narrow_BHNN, tile)
            grad_bHRd, dt_bHRN = self._behind_refined(tile)
            d_value_BHNd[tile.images] += refined_bHRN.mT @ grad_bHRd
            flat_bHL = dt_bHRN.flatten(2)
            sums_3H[0] += flat_bHL.sum((0, 2))
            sums_3H[1] += torch.linalg.vecdot(flat_bHL, narrow_bHRN.flatten(2)).sum(0)
            sums_3H[2] += torch.linalg.vecdot(flat_bHL, map_bHRN.flatten(2)).sum(0)
        t0_H, t1_H, t2_H = sums_3H
        return d_value_BHNd, t0_H, t1_H - self.algebra.mean3_H * t0_H, t2_H - self.algebra.mean_H * t0_H

    def _behind_refined(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The gradients of the output and of T, [b, H, R, d] and [b, H, R, N]."""
        grad_bHRd = self.grad_BHNd[tile.images, :, tile.rows].to(self.precision)
        return grad_bHRd, grad_bHRd @ self.value_BHNd[tile.images].to(self.precision).mT

    def _split(self, tile: Tile, *targets: list[Tensor]) -> list[Tensor]:
        """∂T, h3 and A combined as each target says, [b, H, R, N]: ∂h3 and the direct share of ∂A."""
        narrow_bHRN, map_bHRN = self.read(self.narrow_BHNN, tile), self.read(self.map_BHNN, tile)
        dt_bHRN = self._behind_refined(tile)[1]
        return [
            torch.addcmul(level, dt_bHRN, gain).addcmul_(narrow_bHRN, on_narrow).addcmul_(map_bHRN, on_map)
            for gain, on_narrow, on_map, level in targets
        ]

    def second(self, to_narrow: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 2: ∂project, and the sums of m2 and m2·(h2 − μ2)."""
        self.d_map_BHNN, self.m2_BNNE = torch.empty_like(self.map_BHNN), self.wide_empty()
        d_project_HE = torch.zeros_like(self.project_HE, dtype=torch.float64)
        q0_E = torch.zeros(self.expanded, dtype=torch.float64, device=d_project_HE.device)
        q1_E = q0_E.clone()
        targets = [[self.column(x_H) for x_H in affine] for affine in (to_narrow, to_map)]
        for tile in self.tiles():
            dh3_bHRN, self.d_map_BHNN[tile.images, :, tile.rows] = self._split(tile, *targets)
            u2_bLE, local_bLE = self.second_activated(self.local_BNNE, tile)
            dh3_bHL = dh3_bHRN.flatten(2)
            d_project_HE += torch.bmm(dh3_bHL, u2_bLE).sum(0)
            m2_bLE = _gate(torch.bmm(dh3_bHL.mT, self.project_HE.expand(len(dh3_bHL), -1, -1)), u2_bLE)
            self.m2_BNNE[tile.images, tile.rows] = m2_bLE.unflatten(1, dh3_bHRN.shape[2:])
            q0_E += m2_bLE.sum((0, 1))
            q1_E += (local_bLE * m2_bLE).sum((0, 1))
        return d_project_HE, q0_E, q1_E - self.algebra.mean2_E * q0_E

    def first(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 3: ∂kernel, and the sums of m1 and m1·(A − μ)ᵀ; adds to ∂A what m1 brings."""
        algebra = self.algebra
        slope_E, level_E, gain2_E = (self.exact(x_E) for x_E in (slope_E, level_E, algebra.gain2_E))
        folded_HE, mean_H11 = self.exact(algebra.folded_EH).T, self.column(algebra.mean_H)
        d_kernel_E1kk = torch.zeros_like(self.kernel_E1kk, dtype=torch.float64)
        through_EH = torch.zeros_like(algebra.folded_EH)
        p0_E = through_EH.new_zeros(self.expanded)
        for tile in self.tiles(reach=True):
            dh2_bRNE = torch.addcmul(level_E, self.read_wide(self.local_BNNE, tile, tile.reach), slope_E)
            dh2_bRNE.addcmul_(self.read_wide(self.m2_BNNE, tile, tile.reach), gain2_E)
            u1_bRNE = self.activated(tile, tile.reach)
            u1_bERN, dh2_bERN = (x_bRNE.permute(0, 3, 1, 2) for x_bRNE in (u1_bRNE, dh2_bRNE))
            du1_bERN, share_E1kk = convolution_gradients(u1_bERN, dh2_bERN, self.kernel_E1kk, tile, self.expanded)
            d_kernel_E1kk += share_E1kk
            du1_bRNE = du1_bERN.permute(0, 2, 3, 1)
            m1_bLE = _gate(du1_bRNE, u1_bRNE[:, tile.inner]).flatten(1, 2)
            map_bHRN = self.read(self.map_BHNN, tile) - mean_H11
            p0_E += m1_bLE.sum((0, 1))
            through_EH += torch.bmm(map_bHRN.flatten(2), m1_bLE).sum(0).T
            share_bHL = torch.bmm(folded_HE.expand(len(m1_bLE), -1, -1), m1_bLE.mT)
            self.d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
        return d_kernel_E1kk, p0_E, through_EH

    def through_statistics(self, pull_HH: Tensor, level_H: Tensor) -> Tensor:
        """Pass 4: one small matrix product on A, added to the other shares of ∂A."""
        pull_HH, level_H1 = self.exact(pull_HH), self.exact(level_H)[:, None]
        for tile in self.tiles():
            map_bHRN = self.read(self.map_BHNN, tile)
            share_bHL = torch.baddbmm(level_H1, pull_HH.expand(len(map_bHRN), -1, -1), map_bHRN.flatten(2))
            self.d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
        return self.d_map_BHNN


def _gate(grad: Tensor, activated: Tensor) -> Tensor:
    """The gradient through relu6, zero where it is at either end."""
    return torch.ops.aten.hardtanh_backward(grad, activated, 0.0, 6.0)
