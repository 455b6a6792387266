"""The backward passes of the released refiner, over tiles; the forward ones are in tiled_forward.py.

    1  bwd_output          ∂V, and the sums that norms 3 and 4 need      from ∂out, h3 and A
    2  bwd_reduce          ∂reduce, the sums that norm 2 needs, m2 (the   from ∂out, h3, A and h2
                           gradient after it), the direct share of ∂A
    3  bwd_expand_local    ∂kernel, the sums that norm 1 needs, the       from m2, h2 and A
                           expanded share of ∂A
    4  bwd_map_statistics  the share of ∂A through norm 1's statistics    from A

m2 is the one expanded work buffer.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck.norm_algebra import Affine
from refiner_ds.attention.bottleneck.tiled_forward import ForwardPasses
from refiner_ds.attention.tiling import ops
from refiner_ds.attention.tiling.tiles import Tile, convolution_gradients

__all__ = ["TiledPasses"]


class TiledPasses(ForwardPasses):
    """All passes over tiles, forward and backward; see ``passes.Passes``."""

    def bwd_output(
        self, activations: tuple[Tensor, Tensor], value_BHNd: Tensor, grad_BHNd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pass 1: ∂V, [B, H, N, d], and three sums, [H]."""
        self.local_BENN, self.reduced_BHNN = activations
        self.value_BHNd, self.grad_BHNd = value_BHNd.to(self.precision), grad_BHNd.to(self.precision)
        d_value_BHNd = torch.zeros_like(value_BHNd, dtype=self.precision)
        norms = self.norms34()
        sums_3H = torch.zeros(3, self.heads, dtype=torch.float64, device=d_value_BHNd.device)
        for tile in self.tiles():
            dt_bHRN, reduced_bHRN, map_bHRN = self._reduced_parts(tile)
            refined_bHRN = self.refined(norms, reduced_bHRN, map_bHRN)
            d_value_BHNd[tile.images] += refined_bHRN.mT @ self.grad_BHNd[tile.images, :, tile.rows]
            t0_H, t1_H = ops.gradient_sums(dt_bHRN, reduced_bHRN, self.algebra.mean3_H)
            sums_3H += torch.stack((t0_H, t1_H, ops.gradient_sums(dt_bHRN, map_bHRN, self.algebra.mean_H)[1]))
        return d_value_BHNd, sums_3H[0], sums_3H[1], sums_3H[2]

    def _reduced_parts(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """∂T, h3 and A, [b, H, R, N]."""
        dt_bHRN = self.grad_BHNd[tile.images, :, tile.rows] @ self.value_BHNd[tile.images].mT
        return dt_bHRN, self.read(self.reduced_BHNN, tile), self.read(self.map_BHNN, tile)

    def bwd_reduce(self, to_reduced: Affine, to_map: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 2: ∂reduce, and the sums of m2 and m2·(h2 − μ2)."""
        self.d_map_BHNN, self.m2_BENN = torch.empty_like(self.map_BHNN), self.empty_expanded()
        d_reduce_HE = torch.zeros_like(self.reduce_HE, dtype=torch.float64)
        sums_2E = torch.zeros(2, self.expanded, dtype=torch.float64, device=d_reduce_HE.device)
        norm = self.norm2()
        (*on_reduced, level3_H), (*on_map, level_H) = (self.exact(*affine) for affine in (to_reduced, to_map))
        for tile in self.tiles():
            parts = self._reduced_parts(tile)
            dh3_bHRN = ops.combine(level3_H, *zip(parts, on_reduced, strict=True))
            direct_bHRN = ops.combine(level_H, *zip(parts, on_map, strict=True))
            if (outside := self.outside(tile)) is not None:
                dh3_bHRN.masked_fill_(outside, 0.0)
            self.d_map_BHNN[tile.images, :, tile.rows] = direct_bHRN
            local_bERN = self.read(self.local_BENN, tile)
            u2_bERN = ops.affine(local_bERN, *norm).clamp_(0, 6)
            d_reduce_HE += ops.correlate(dh3_bHRN, u2_bERN)
            m2_bERN = _relu6_gradient(ops.expand(dh3_bHRN, self.reduce_HE.T), u2_bERN)
            self.m2_BENN[tile.images, :, tile.rows] = m2_bERN
            sums_2E += torch.stack(ops.gradient_sums(m2_bERN, local_bERN, self.algebra.mean2_E))
        return d_reduce_HE, sums_2E[0], sums_2E[1]

    def bwd_expand_local(self, slope_E: Tensor, level_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 3: ∂kernel, and the sums of m1 and m1·(A − μ)ᵀ; adds to ∂A what comes through m1."""
        algebra, expansion = self.algebra, self.expansion()
        # The kernel takes the gain: ∂h2 = gain2·(m2 + slope/gain2·h2 + level/gain2), all of it zero where gain2 is.
        gain_E111 = algebra.gain2_E[:, None, None, None]
        kernel_E1kk = (self.kernel_E1kk * gain_E111).to(self.precision)
        slope_E, level_E = self.exact(*((x_E / algebra.gain2_E).nan_to_num(0, 0, 0) for x_E in (slope_E, level_E)))
        folded_HE, (mean_H,) = algebra.folded_EH.to(self.precision).T, self.exact(algebra.mean_H)
        d_kernel_E1kk = torch.zeros_like(self.kernel_E1kk, dtype=torch.float64)
        cross_HE = torch.zeros_like(algebra.folded_EH.T)
        p0_E = cross_HE.new_zeros(self.expanded)
        for tile in self.tiles(halo=True):
            dh2_bERN = ops.affine(self.read(self.local_BENN, tile, tile.with_halo), slope_E, level_E)
            dh2_bERN += self.read(self.m2_BENN, tile, tile.with_halo)
            if (outside := self.outside(tile, tile.with_halo)) is not None:
                dh2_bERN.masked_fill_(outside, 0.0)
            u1_bERN = self.activated(expansion, tile)
            du1_bERN, share_E1kk = convolution_gradients(u1_bERN, dh2_bERN, kernel_E1kk, tile, self.expanded)
            d_kernel_E1kk += share_E1kk
            m1_bERN = _relu6_gradient(du1_bERN, u1_bERN[:, :, tile.interior])
            p0_E += ops.total(m1_bERN)
            centred_bHRN = ops.affine(self.read(self.map_BHNN, tile), None, -mean_H)
            cross_HE += ops.correlate(centred_bHRN, m1_bERN)
            self.d_map_BHNN[tile.images, :, tile.rows] += ops.reduce(m1_bERN, folded_HE)
        return d_kernel_E1kk * gain_E111, p0_E, cross_HE.T

    def bwd_map_statistics(self, gain_HH: Tensor, level_H: Tensor) -> Tensor:
        """Pass 4: one small matrix product on A, added to the rest of ∂A."""
        gain_HH, level_H = self.exact(gain_HH, level_H)
        for tile in self.tiles():
            map_bHRN = self.read(self.map_BHNN, tile)
            share_bHL = torch.baddbmm(level_H[:, None], gain_HH.expand(len(map_bHRN), -1, -1), map_bHRN.flatten(2))
            self.d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
        return self.d_map_BHNN


def _relu6_gradient(grad: Tensor, activated: Tensor) -> Tensor:
    """The gradient of relu6, zero where it clips."""
    return torch.ops.aten.hardtanh_backward(grad, activated, 0.0, 6.0)
