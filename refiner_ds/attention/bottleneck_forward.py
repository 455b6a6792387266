"""The released refiner in training without its expanded maps: four passes over tiles, forward.

    A ─ expand, norm 1, relu6 ─ local ─> h2 ─ norm 2, relu6 ─ project ─> h3 ─ norm 3, + A, norm 4 ─> T ─ · V ─> out

    1  moments of A                  every statistic of norm 1 is linear in the mean and covariance over heads
    2  h2, and its moments           norm 1 folded into the expansion
    3  h3, and its moments with A    norm 2 folded into one affine map; norms 3 and 4 both follow from these
    4  out                           T = α·h3 + β·A + γ exists tile by tile only

h2 and h3 are written, one layer's at a time and in the map's dtype; u1, u2 and T never are. Expanded maps lie with E
last, [b, R, N, E]: on CPU depthwise convolution runs several times as fast that way.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.attention.moments import Moments, fold_norm, update_running
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.parameters import BottleneckRefiner
from refiner_ds.attention.tiles import Tile, convolve, tiles

__all__ = ["Layer", "Statistics"]


class Statistics(NamedTuple):
    """What the four norms need of a batch, float64: A's mean and covariance over heads, then moments of h2 and h3.

    ``joint_22H`` is the covariance of (h3, A) within each head.
    """

    mean_H: Tensor
    covariance_HH: Tensor
    mean2_E: Tensor
    variance2_E: Tensor
    mean3_H: Tensor
    joint_22H: Tensor


class Layer:
    """The tensors of one refinement, its statistics as far as they are known, and what follows from both.

    Args:
        map_BHNN: the maps; expanded ones are stored in their dtype and computed in fp32 or better.
        refiner: weights and norms.
        scale: factor on the refined maps.
    """

    def __init__(self, map_BHNN: Tensor, refiner: BottleneckRefiner, scale: float) -> None:
        self.map_BHNN, self.refiner, self.scale = map_BHNN, refiner, scale
        self.precision = statistics_dtype(map_BHNN.dtype)
        self.kernel_E1kk = refiner.local.kernels[0].to(self.precision)
        self.project_HE = refiner.project_HE.to(self.precision)
        self.expanded, self.heads = refiner.expand_EH.shape

    def tiles(self, reach: bool = False) -> list[Tile]:
        """The tiles of this layer, with the kernel's reach or without."""
        batch, _, tokens, _ = self.map_BHNN.shape
        radius = self.kernel_E1kk.shape[-1] // 2 if reach else 0
        return list(tiles(batch, tokens, self.expanded, self.map_BHNN.device, radius))

    def read(self, stack: Tensor, tile: Tile, rows: slice | None = None) -> Tensor:
        """The tile's rows of A or h3, [B, H, N, N] to [b, H, R, N], in fp32 or better."""
        return stack[tile.images, :, rows or tile.rows].to(self.precision)

    def read_wide(self, stack_BNNE: Tensor, tile: Tile, rows: slice | None = None) -> Tensor:
        """The tile's rows of an expanded stack, [B, N, N, E] to [b, R, N, E], in fp32 or better."""
        return stack_BNNE[tile.images, rows or tile.rows].to(self.precision)

    def wide_empty(self) -> Tensor:
        """Room for an expanded stack in the map's dtype, [B, N, N, E]."""
        batch, _, tokens, _ = self.map_BHNN.shape
        return self.map_BHNN.new_empty(batch, tokens, tokens, self.expanded)

    # -- the norms, folded -------------------------------------------------------------------------------------------

    def fold_first(self, mean_H: Tensor, covariance_HH: Tensor) -> tuple[Tensor, Tensor]:
        """Norm 1: its mean and variance from A's alone; sets what expansion multiplies with and adds."""
        expand_EH = self.refiner.expand_EH.double()
        mean_E = expand_EH @ mean_H
        variance_E = ((expand_EH @ covariance_HH) * expand_EH).sum(1).clamp(min=0)
        gain_E, self.inverse1_E = fold_norm(self.refiner.norm1_E, mean_E, variance_E)
        folded_EH = gain_E[:, None] * expand_EH
        self.folded_EH = folded_EH.to(self.precision)
        self.shift1_E = (self.refiner.norm1_E.bias.double() - folded_EH @ mean_H).to(self.precision)
        return mean_E, variance_E

    def fold_second(self, mean_E: Tensor, variance_E: Tensor) -> None:
        """Norm 2 as gain and shift."""
        gain_E, self.inverse2_E = fold_norm(self.refiner.norm2_E, mean_E, variance_E)
        self.gain2_E = gain_E.to(self.precision)
        self.shift2_E = (self.refiner.norm2_E.bias.double() - gain_E * mean_E).to(self.precision)

    def fold_last(self, mean3_H: Tensor, joint_22H: Tensor, mean_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms 3 and 4 as T = α·h3 + β·A + γ; returns variance 3, mean 4 and variance 4."""
        variance3_H, cross_H, variance_H = joint_22H[0, 0], joint_22H[0, 1], joint_22H[1, 1]
        self.kappa_H, self.inverse3_H = fold_norm(self.refiner.norm3_H, mean3_H, variance3_H)
        variance4_H = self.kappa_H.square() * variance3_H + 2 * self.kappa_H * cross_H + variance_H
        mean4_H = self.refiner.norm3_H.bias.double() + mean_H
        gain_H, self.inverse4_H = fold_norm(self.refiner.adapt_H, mean4_H, variance4_H.clamp(min=0))
        self.beta_H = self.scale * gain_H
        self.alpha_H = self.beta_H * self.kappa_H
        gamma_H = self.scale * self.refiner.adapt_H.bias.double() - self.alpha_H * mean3_H - self.beta_H * mean_H
        self._refined = [self.column(x_H) for x_H in (self.alpha_H, self.beta_H, gamma_H)]
        return variance3_H, mean4_H, variance4_H

    def column(self, x_H: Tensor) -> Tensor:
        """A number a head, to be combined with [b, H, R, N]."""
        return x_H.to(self.precision)[:, None, None]

    # -- the passes --------------------------------------------------------------------------------------------------

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Pass 1: mean and covariance of A over heads, [H] and [H, H], float64."""
        moments = Moments(self.heads, 1, self.map_BHNN.device)
        for tile in self.tiles():
            map_HL = self.read(self.map_BHNN, tile).transpose(0, 1).flatten(1)
            mean_H1 = map_HL.mean(1, keepdim=True)
            centred_HL = map_HL - mean_H1
            moments.add(map_HL.shape[1], mean_H1, (centred_HL @ centred_HL.T)[..., None])
        return moments.mean_KC[:, 0], moments.covariance_KKC[..., 0]

    def activated(self, tile: Tile, rows: slice) -> Tensor:
        """u1, the expanded maps behind norm 1 and its relu6, [b, R, N, E]."""
        map_bHL = self.read(self.map_BHNN, tile, rows).flatten(2)
        shape = (map_bHL.shape[0], self.heads, self.expanded)
        wide_bLE = torch.baddbmm(self.shift1_E, map_bHL.mT, self.folded_EH.T.expand(shape))
        return wide_bLE.clamp_(0, 6).unflatten(1, (rows.stop - rows.start, -1))

    def local_maps(self, moments: Moments | None = None) -> Tensor:
        """Pass 2: h2, [B, N, N, E]; its moments are added to ``moments``."""
        local_BNNE = self.wide_empty()
        for tile in self.tiles(reach=True):
            u1_bERN = self.activated(tile, tile.reach).permute(0, 3, 1, 2)
            h2_bRNE = convolve(u1_bERN, self.kernel_E1kk, tile, self.expanded).permute(0, 2, 3, 1)
            local_BNNE[tile.images, tile.rows] = h2_bRNE
            if moments is not None:
                h2_LE = h2_bRNE.reshape(-1, self.expanded)
                mean_E = h2_LE.mean(0)
                centred_LE = h2_LE - mean_E
                moments.add(len(h2_LE), mean_E[None], centred_LE.square_().sum(0)[None, None])
        return local_BNNE

    def second_activated(self, local_BNNE: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """u2 and h2, [b, L, E]."""
        local_bLE = self.read_wide(local_BNNE, tile).flatten(1, 2)
        return torch.addcmul(self.shift2_E, local_bLE, self.gain2_E).clamp_(0, 6), local_bLE

    def narrow_maps(self, local_BNNE: Tensor, moments: Moments | None = None) -> Tensor:
        """Pass 3: h3, [B, H, N, N]; its moments with A are added to ``moments``."""
        narrow_BHNN = torch.empty_like(self.map_BHNN, memory_format=torch.contiguous_format)
        for tile in self.tiles():
            u2_bLE = self.second_activated(local_BNNE, tile)[0]
            h3_bHL = torch.bmm(self.project_HE.expand(len(u2_bLE), -1, -1), u2_bLE.mT)
            map_bHRN = self.read(self.map_BHNN, tile)
            narrow_BHNN[tile.images, :, tile.rows] = h3_bHL.view_as(map_bHRN)
            if moments is not None:
                self._add_joint(moments, h3_bHL, map_bHRN.flatten(2))
        return narrow_BHNN

    @staticmethod
    def _add_joint(moments: Moments, narrow_bHL: Tensor, map_bHL: Tensor) -> None:
        means_2H1 = torch.stack((narrow_bHL.mean((0, 2)), map_bHL.mean((0, 2))))[..., None]
        first_bHL, second_bHL = narrow_bHL - means_2H1[0], map_bHL - means_2H1[1]
        cross_H = torch.linalg.vecdot(first_bHL, second_bHL).sum(0)
        squares = [torch.linalg.vecdot(x_bHL, x_bHL).sum(0) for x_bHL in (first_bHL, second_bHL)]
        comoment_22H = torch.stack((squares[0], cross_H, cross_H, squares[1])).unflatten(0, (2, 2))
        moments.add(len(map_bHL) * map_bHL.shape[2], means_2H1[..., 0], comoment_22H)

    def refined(self, narrow_BHNN: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """T, h3 and A, all [b, H, R, N]."""
        narrow_bHRN, map_bHRN = self.read(narrow_BHNN, tile), self.read(self.map_BHNN, tile)
        alpha, beta, gamma = self._refined
        return torch.addcmul(gamma, narrow_bHRN, alpha).addcmul_(map_bHRN, beta), narrow_bHRN, map_bHRN

    def output(self, narrow_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Pass 4: refined maps times values, [B, H, N, d]."""
        out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
        for tile in self.tiles():
            value_bHNd = value_BHNd[tile.images].to(self.precision)
            out_BHNd[tile.images, :, tile.rows] = self.refined(narrow_BHNN, tile)[0] @ value_bHNd
        return out_BHNd

    def measure(self) -> tuple[Statistics, Tensor, Tensor]:
        """Passes 1 to 3: the batch's statistics, counted in the norms' running ones, and the stacks h2 and h3."""
        count = self.map_BHNN.numel() // self.heads
        norms, device = self.refiner, self.map_BHNN.device
        mean_H, covariance_HH = self.map_moments()
        update_running(norms.norm1_E, *self.fold_first(mean_H, covariance_HH), count)
        second, last = Moments(1, self.expanded, device), Moments(2, self.heads, device)
        local_BNNE = self.local_maps(second)
        moments2 = second.mean_KC[0], second.covariance_KKC[0, 0]
        self.fold_second(*moments2)
        update_running(norms.norm2_E, *moments2, count)
        narrow_BHNN = self.narrow_maps(local_BNNE, last)
        mean3_H, joint_22H = last.mean_KC[0], last.covariance_KKC
        variance3_H, mean4_H, variance4_H = self.fold_last(mean3_H, joint_22H, mean_H)
        update_running(norms.norm3_H, mean3_H, variance3_H, count)
        update_running(norms.adapt_H, mean4_H, variance4_H, count)
        return Statistics(mean_H, covariance_HH, *moments2, mean3_H, joint_22H), local_BNNE, narrow_BHNN

    def fold(self, statistics: Statistics) -> None:
        """Fold all four norms with statistics measured before."""
        self.fold_first(statistics.mean_H, statistics.covariance_HH)
        self.fold_second(statistics.mean2_E, statistics.variance2_E)
        self.fold_last(statistics.mean3_H, statistics.joint_22H, statistics.mean_H)
