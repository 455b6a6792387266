"""The released refiner in training without its expanded maps: four passes over tiles, forward.

    A ─ expand, norm 1, relu6 ─ local ─> h2 ─ norm 2, relu6 ─ project ─> h3 ─ norm 3, + A, norm 4 ─> T ─ · V ─> out

    1  moments of A                  every statistic of norm 1 is linear in the mean and covariance over heads
    2  h2, and its moments           norm 1 folded into the expansion
    3  h3, and its moments with A    norm 2 folded into one affine map; norms 3 and 4 both follow from these
    4  out                           T = α·h3 + β·A + γ exists tile by tile only

h2 and h3 are written, one layer's at a time and in the map's dtype; u1, u2 and T never are. Expanded maps lie with E
last in memory, which on CPU makes depthwise convolution several times as fast. Whatever maps are stored in,
the arithmetic is fp32 or better: multiplying halves saves CPU time at few tokens only, and gradients that norms pull
close to zero would err up to ten times as much.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck_algebra import Algebra
from refiner_ds.attention.lean_steps import affine, combine, joint_moments, moments, narrow, widen
from refiner_ds.attention.moments import Moments
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiles import Tile, convolve, tiles

__all__ = ["ForwardPasses"]


class ForwardPasses:
    """The passes forward over the tiles of one refinement; see ``bottleneck_function.Passes`` for each.

    Args:
        map_BHNN: the maps; stacks are stored in their dtype.
        algebra: the norms, folded as far as each pass needs them.
    """

    def __init__(self, map_BHNN: Tensor, algebra: Algebra) -> None:
        self.map_BHNN, self.algebra = map_BHNN, algebra
        self.precision = statistics_dtype(map_BHNN.dtype)
        self.kernel_E1kk = algebra.refiner.local.kernels[0].to(self.precision)
        self.project_HE = algebra.refiner.project_HE.to(self.precision)
        self.heads, self.expanded = self.project_HE.shape

    def exact(self, *small: Tensor) -> list[Tensor]:
        """Weights, or numbers a map, in the precision of the arithmetic."""
        return [tensor.to(self.precision) for tensor in small]

    def tiles(self, reach: bool = False) -> list[Tile]:
        """The tiles of this layer, with the kernel's reach or without."""
        batch, _, tokens, _ = self.map_BHNN.shape
        radius = self.kernel_E1kk.shape[-1] // 2 if reach else 0
        return list(tiles(batch, tokens, self.expanded, self.map_BHNN.device, radius, self.precision.itemsize))

    def read(self, stack: Tensor, tile: Tile, rows: slice | None = None) -> Tensor:
        """The tile's rows of a stack of maps in fp32 or better, in the memory format they have."""
        return stack[tile.images, :, rows or tile.rows].to(self.precision)

    def wide_empty(self) -> Tensor:
        """Room for an expanded stack in the map's dtype, [B, E, N, N] with E last in memory."""
        batch, _, tokens, _ = self.map_BHNN.shape
        empty_BNNE = self.map_BHNN.new_empty(batch, tokens, tokens, self.expanded)
        return empty_BNNE.permute(0, 3, 1, 2)

    def map_moments(self) -> tuple[Tensor, Tensor]:
        """Pass 1: mean and covariance of A over heads, [H] and [H, H]."""
        found = Moments(self.heads, 1, self.map_BHNN.device)
        for tile in self.tiles():
            map_HL = self.read(self.map_BHNN, tile).transpose(0, 1).flatten(1)
            mean_H1 = map_HL.mean(1, keepdim=True)
            centred_HL = map_HL - mean_H1
            found.add(map_HL.shape[1], mean_H1, (centred_HL @ centred_HL.T)[..., None])
        return found.mean_KC[:, 0], found.covariance_KKC[..., 0]

    def expansion(self) -> list[Tensor]:
        """Weight and bias that make what norm 1's relu6 clips."""
        return self.exact(self.algebra.folded_EH, self.algebra.shift1_E)

    def activated(self, expansion: list[Tensor], tile: Tile) -> Tensor:
        """u1, the expanded maps behind norm 1 and its relu6, [b, E, R + reach, N]."""
        return widen(self.read(self.map_BHNN, tile, tile.reach), *expansion).clamp_(0, 6)

    def local_maps(self, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Pass 2: h2, [B, E, N, N], and its mean and variance."""
        local_BENN, found = self.wide_empty(), Moments(1, self.expanded, self.map_BHNN.device)
        expansion = self.expansion()
        for tile in self.tiles(reach=True):
            h2_bERN = convolve(self.activated(expansion, tile), self.kernel_E1kk, tile, self.expanded)
            local_BENN[tile.images, :, tile.rows] = h2_bERN
            if measure:
                mean_E, squares_E = moments(h2_bERN)
                found.add(h2_bERN.numel() // self.expanded, mean_E[None], squares_E[None, None])
        return local_BENN, (found.mean_KC[0], found.covariance_KKC[0, 0]) if measure else None

    def second_norm(self) -> list[Tensor]:
        """Norm 2 as gain and shift."""
        return self.exact(self.algebra.gain2_E, self.algebra.shift2_E)

    def narrow_maps(self, local_BENN: Tensor, measure: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Pass 3: h3, [B, H, N, N], and its mean and covariance with A."""
        narrow_BHNN = torch.empty_like(self.map_BHNN, memory_format=torch.contiguous_format)
        found, norm = Moments(2, self.heads, self.map_BHNN.device), self.second_norm()
        for tile in self.tiles():
            h3_bHRN = narrow(affine(self.read(local_BENN, tile), *norm).clamp_(0, 6), self.project_HE)
            narrow_BHNN[tile.images, :, tile.rows] = h3_bHRN
            if measure:
                found.add(h3_bHRN.numel() // self.heads, *joint_moments(h3_bHRN, self.read(self.map_BHNN, tile)))
        return narrow_BHNN, (found.mean_KC[0], found.covariance_KKC) if measure else None

    def last_norms(self) -> list[Tensor]:
        """Norms 3 and 4: what multiplies h3 and A, and what is added."""
        return self.exact(self.algebra.alpha_H, self.algebra.beta_H, self.algebra.gamma_H)

    def refined(self, norms: list[Tensor], narrow_bHRN: Tensor, map_bHRN: Tensor) -> Tensor:
        """T, [b, H, R, N]."""
        alpha_H, beta_H, gamma_H = norms
        return combine(gamma_H, (narrow_bHRN, alpha_H), (map_bHRN, beta_H))

    def output(self, narrow_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        """Pass 4: refined maps times values, [B, H, N, d]."""
        out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
        value_BHNd, norms = value_BHNd.to(self.precision), self.last_norms()
        for tile in self.tiles():
            refined_bHRN = self.refined(norms, self.read(narrow_BHNN, tile), self.read(self.map_BHNN, tile))
            out_BHNd[tile.images, :, tile.rows] = refined_bHRN @ value_BHNd[tile.images]
        return out_BHNd
