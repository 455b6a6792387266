"""The forward passes of the released refiner in training, over tiles.

    A ─ expand, norm 1, relu6 ─ local ─> h2 ─ norm 2, relu6 ─ reduce ─> h3 ─ norm 3, + A, norm 4 ─> T ─ · V ─> out

    1  map_moments    moments of A                every statistic of norm 1 is linear in A's mean and covariance
    2  expand_local   h2, and its moments         norm 1 folded into the expansion
    3  reduce         h3, and its moments with A  norm 2 folded into one affine map; norms 3 and 4 follow from these
    4  output         out                         T = α·h3 + β·A + γ exists tile by tile only

h2 and h3 are written, one layer's at a time and in the map's dtype; u1, u2 and T never are. Expanded maps have E last
in memory, which on CPU makes depthwise convolution several times as fast. Whatever maps are stored in, the arithmetic
is fp32 or better: multiplying in half precision saves CPU time at few tokens only, and gradients that norms bring
close to zero would have up to ten times the error.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck.norm_algebra import NormAlgebra
from refiner_ds.attention.masking import outside_rows
from refiner_ds.attention.moments import Moments
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiling import ops
from refiner_ds.attention.tiling.tiles import Tile, convolve, tiles

__all__ = ["ForwardPasses"]


class ForwardPasses:
    """The passes forward over the tiles of one refinement; see ``passes.Passes``.

    Args:
        map_BHNN: the maps; activations are stored in their dtype.
        algebra: the norms, folded as far as each pass needs them.
        mask_BN: which tokens are real. Statistics are of their entries; u1 is zero outside them, as it is outside a
            map; h2, h3 and T are any numbers there, which ∂T, ∂h3 and ∂h2 of zero keep out of every gradient.
    """

    def __init__(self, map_BHNN: Tensor, algebra: NormAlgebra, mask_BN: Tensor | None = None) -> None:
        self.mask_BN = mask_BN
        self.map_BHNN, self.algebra = map_BHNN, algebra
        self.precision = statistics_dtype(map_BHNN.dtype)
        self.kernel_E1kk = algebra.weights.local.kernels[0].to(self.precision)
        self.reduce_HE = algebra.weights.reduce_HE.to(self.precision)
        self.heads, self.expanded = self.reduce_HE.shape

    def exact(self, *small: Tensor) -> list[Tensor]:
        """Weights, or numbers a map, in the precision of the arithmetic."""
        return [tensor.to(self.precision) for tensor in small]

    def tiles(self, halo: bool = False) -> list[Tile]:
        """The tiles of this layer, with the kernel's halo or without."""
        batch, _, tokens, _ = self.map_BHNN.shape
        radius = self.kernel_E1kk.shape[-1] // 2 if halo else 0
        return list(tiles(batch, tokens, self.expanded, self.map_BHNN.device, radius, self.precision.itemsize))

    def outside(self, tile: Tile, rows: slice | None = None) -> Tensor | None:
        """The entries of the tile's rows that are not real, [b, 1, R, N]; ``None`` where all are."""
        return None if self.mask_BN is None else outside_rows(self.mask_BN[tile.images], rows or tile.rows)

    def read(self, x_BCNN: Tensor, tile: Tile, rows: slice | None = None) -> Tensor:
        """The tile's rows of some maps in fp32 or better, in the memory format they have."""
        return x_BCNN[tile.images, :, rows or tile.rows].to(self.precision)

    def empty_expanded(self) -> Tensor:
        """Uninitialised expanded maps in the map's dtype, [B, E, N, N] with E last in memory."""
        batch, _, tokens, _ = self.map_BHNN.shape
        empty_BNNE = self.map_BHNN.new_empty(batch, tokens, tokens, self.expanded)
        return empty_BNNE.permute(0, 3, 1, 2)

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Pass 1: mean and covariance of A over heads, [H] and [H, H]."""
        found = Moments(self.heads, 1, self.map_BHNN.device)
        for tile in self.tiles():
            map_HL = self.read(self.map_BHNN, tile).transpose(0, 1).flatten(1)
            if (outside := self.outside(tile)) is not None:
                map_HL = map_HL[:, ~outside.flatten()]
                if map_HL.shape[1] == 0:
                    continue
            mean_H1 = map_HL.mean(1, keepdim=True)
            centred_HL = map_HL - mean_H1
            found.add(map_HL.shape[1], mean_H1, (centred_HL @ centred_HL.T)[..., None])
        return found.mean_KC[:, 0], found.covariance_KKC[..., 0]

    def expansion(self) -> list[Tensor]:
        """Weight and bias of the expansion with norm 1 folded into it."""
        return self.exact(self.algebra.folded_EH, self.algebra.shift1_E)

    def activated(self, expansion: list[Tensor], tile: Tile) -> Tensor:
        """u1, the expanded maps after norm 1 and its relu6, [b, E, R + halo, N]."""
        u1_bERN = ops.expand(self.read(self.map_BHNN, tile, tile.with_halo), *expansion).clamp_(0, 6)
        outside = self.outside(tile, tile.with_halo)
        return u1_bERN if outside is None else u1_bERN.masked_fill_(outside, 0.0)

    def expand_local(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pass 2: h2, [B, E, N, N], and its mean and variance."""
        found = Moments(1, self.expanded, self.map_BHNN.device)
        return self._expand_local(found), (found.mean_KC[0], found.covariance_KKC[0, 0])

    def _expand_local(self, found: Moments | None = None) -> Tensor:
        """h2; its moments are added to ``found``."""
        local_BENN, expansion = self.empty_expanded(), self.expansion()
        for tile in self.tiles(halo=True):
            h2_bERN = convolve(self.activated(expansion, tile), self.kernel_E1kk, tile, self.expanded)
            local_BENN[tile.images, :, tile.rows] = h2_bERN
            if found is not None and (outside := self.outside(tile)) is not None:
                found.add(*ops.real_moments(outside, h2_bERN))
            elif found is not None:
                mean_E, squares_E = ops.moments(h2_bERN)
                found.add(h2_bERN.numel() // self.expanded, mean_E[None], squares_E[None, None])
        return local_BENN

    def norm2(self) -> list[Tensor]:
        """Norm 2 as gain and shift."""
        return self.exact(self.algebra.gain2_E, self.algebra.shift2_E)

    def reduce(self, local_BENN: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pass 3: h3, [B, H, N, N], and its mean and covariance with A."""
        found = Moments(2, self.heads, self.map_BHNN.device)
        return self._reduce(local_BENN, found), (found.mean_KC[0], found.covariance_KKC)

    def _reduce(self, local_BENN: Tensor, found: Moments | None = None) -> Tensor:
        """h3; its moments with A are added to ``found``."""
        reduced_BHNN, norm = torch.empty_like(self.map_BHNN, memory_format=torch.contiguous_format), self.norm2()
        for tile in self.tiles():
            h3_bHRN = ops.reduce(ops.affine(self.read(local_BENN, tile), *norm).clamp_(0, 6), self.reduce_HE)
            reduced_BHNN[tile.images, :, tile.rows] = h3_bHRN
            if found is not None and (outside := self.outside(tile)) is not None:
                found.add(*ops.real_moments(outside, h3_bHRN, self.read(self.map_BHNN, tile)))
            elif found is not None:
                found.add(h3_bHRN.numel() // self.heads, *ops.joint_moments(h3_bHRN, self.read(self.map_BHNN, tile)))
        return reduced_BHNN

    def recompute(self) -> tuple[Tensor, Tensor]:
        """h2 and h3 again, without measuring them."""
        local_BENN = self._expand_local()
        return local_BENN, self._reduce(local_BENN)

    def norms34(self) -> list[Tensor]:
        """Norms 3 and 4: what multiplies h3 and A, and what is added."""
        return self.exact(self.algebra.alpha_H, self.algebra.beta_H, self.algebra.gamma_H)

    def refined(self, norms: list[Tensor], reduced_bHRN: Tensor, map_bHRN: Tensor) -> Tensor:
        """T, [b, H, R, N]."""
        alpha_H, beta_H, gamma_H = norms
        return ops.combine(gamma_H, (reduced_bHRN, alpha_H), (map_bHRN, beta_H))

    def output(self, reduced_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Pass 4: refined maps times values, [B, H, N, d]."""
        out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
        value_BHNd, norms = value_BHNd.to(self.precision), self.norms34()
        for tile in self.tiles():
            refined_bHRN = self.refined(norms, self.read(reduced_BHNN, tile), self.read(self.map_BHNN, tile))
            out_BHNd[tile.images, :, tile.rows] = refined_bHRN @ value_BHNd[tile.images]
        return out_BHNd
