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

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck_algebra import Algebra
from refiner_ds.attention.moments import Moments
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiles import Tile, convolve, tiles

__all__ = ["ForwardPasses"]


class ForwardPasses:
    """The passes forward over the tiles of one refinement; see ``bottleneck_function.Passes`` for each.

    Args:
        map_BHNN: the maps; expanded ones are stored in their dtype and computed in fp32 or better.
        algebra: the norms, folded as far as each pass needs them.
    """

    def __init__(self, map_BHNN: Tensor, algebra: Algebra) -> None:
        self.map_BHNN, self.algebra = map_BHNN, algebra
        self.precision = statistics_dtype(map_BHNN.dtype)
        self.kernel_E1kk = self.exact(algebra.refiner.local.kernels[0])
        self.project_HE = self.exact(algebra.refiner.project_HE)
        self.heads, self.expanded = self.project_HE.shape

    def exact(self, small: Tensor) -> Tensor:
        """Weights, or numbers a map, in the precision of the arithmetic."""
        return small.to(self.precision)

    def column(self, x_H: Tensor) -> Tensor:
        """A number a head, to be combined with [b, H, R, N]."""
        return self.exact(x_H)[:, None, None]

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

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Pass 1: mean and covariance of A over heads, [H] and [H, H]."""
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
        folded_EH, shift1_E = self.exact(self.algebra.folded_EH), self.exact(self.algebra.shift1_E)
        wide_bLE = torch.baddbmm(shift1_E, map_bHL.mT, folded_EH.T.expand(shape))
        return wide_bLE.clamp_(0, 6).unflatten(1, (rows.stop - rows.start, -1))

    def local_maps(self, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Pass 2: h2, [B, N, N, E], and its mean and variance."""
        local_BNNE, moments = self.wide_empty(), Moments(1, self.expanded, self.map_BHNN.device)
        for tile in self.tiles(reach=True):
            u1_bERN = self.activated(tile, tile.reach).permute(0, 3, 1, 2)
            h2_bRNE = convolve(u1_bERN, self.kernel_E1kk, tile, self.expanded).permute(0, 2, 3, 1)
            local_BNNE[tile.images, tile.rows] = h2_bRNE
            if measure:
                h2_LE = h2_bRNE.reshape(-1, self.expanded)
                mean_E = h2_LE.mean(0)
                centred_LE = h2_LE - mean_E
                moments.add(len(h2_LE), mean_E[None], centred_LE.square_().sum(0)[None, None])
        return local_BNNE, (moments.mean_KC[0], moments.covariance_KKC[0, 0]) if measure else None

    def second_activated(self, local_BNNE: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """u2 and h2, [b, L, E]."""
        local_bLE = self.read_wide(local_BNNE, tile).flatten(1, 2)
        gain2_E, shift2_E = self.exact(self.algebra.gain2_E), self.exact(self.algebra.shift2_E)
        return torch.addcmul(shift2_E, local_bLE, gain2_E).clamp_(0, 6), local_bLE

    def narrow_maps(self, local_BNNE: Tensor, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Pass 3: h3, [B, H, N, N], and its mean and covariance with A."""
        narrow_BHNN = torch.empty_like(self.map_BHNN, memory_format=torch.contiguous_format)
        moments = Moments(2, self.heads, self.map_BHNN.device)
        for tile in self.tiles():
            u2_bLE = self.second_activated(local_BNNE, tile)[0]
            h3_bHL = torch.bmm(self.project_HE.expand(len(u2_bLE), -1, -1), u2_bLE.mT)
            map_bHRN = self.read(self.map_BHNN, tile)
            narrow_BHNN[tile.images, :, tile.rows] = h3_bHL.view_as(map_bHRN)
            if measure:
                _add_joint(moments, h3_bHL, map_bHRN.flatten(2))
        return narrow_BHNN, (moments.mean_KC[0], moments.covariance_KKC) if measure else None

    def refined(self, narrow_BHNN: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """T, h3 and A, all [b, H, R, N]."""
        narrow_bHRN, map_bHRN = self.read(narrow_BHNN, tile), self.read(self.map_BHNN, tile)
        algebra = self.algebra
        alpha, beta, gamma = (self.column(x_H) for x_H in (algebra.alpha_H, algebra.beta_H, algebra.gamma_H))
        return torch.addcmul(gamma, narrow_bHRN, alpha).addcmul_(map_bHRN, beta), narrow_bHRN, map_bHRN

    def output(self, narrow_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Pass 4: refined maps times values, [B, H, N, d]."""
        out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
        for tile in self.tiles():
            value_bHNd = value_BHNd[tile.images].to(self.precision)
            out_BHNd[tile.images, :, tile.rows] = self.refined(narrow_BHNN, tile)[0] @ value_bHNd
        return out_BHNd


def _add_joint(moments: Moments, narrow_bHL: Tensor, map_bHL: Tensor) -> None:
    """Add a tile's means of (h3, A) and their sums of products about them."""
    means_2H1 = torch.stack((narrow_bHL.mean((0, 2)), map_bHL.mean((0, 2))))[..., None]
    first_bHL, second_bHL = narrow_bHL - means_2H1[0], map_bHL - means_2H1[1]
    cross_H = torch.linalg.vecdot(first_bHL, second_bHL).sum(0)
    squares = [torch.linalg.vecdot(x_bHL, x_bHL).sum(0) for x_bHL in (first_bHL, second_bHL)]
    comoment_22H = torch.stack((squares[0], cross_H, cross_H, squares[1])).unflatten(0, (2, 2))
    moments.add(len(map_bHL) * map_bHL.shape[2], means_2H1[..., 0], comoment_22H)
