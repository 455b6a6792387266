"""The released refiner for inference: norms folded, one pass over tiles, no expanded map ever whole.

    A ─ expand, bias, clip ─ local, bias, clip ─ project, + gain·A + shift ─ · V ─> out, all of it tile by tile

Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.parameters import FoldedRefiner
from refiner_ds.attention.tiles import convolve, tiles

__all__ = ["refine_folded"]


@torch.no_grad()
def refine_folded(map_BHNN: Tensor, value_BHNd: Tensor, refiner: FoldedRefiner) -> Tensor:
    """Refined maps times values, [B, H, N, d]; constraint "none" only, and nothing for backward."""
    precision = statistics_dtype(map_BHNN.dtype)
    expand_EH, bias1_E, kernel_E1kk, bias2_E, project_HE, gain_H, shift_H = (
        tensor.to(precision)
        for tensor in (
            refiner.expand_EH, refiner.bias1_E, refiner.local.kernels[0], refiner.bias2_E, refiner.project_HE,
            refiner.gain_H[:, None], refiner.shift_H[:, None],
        )
    )  # fmt: skip
    batch, _, tokens, _ = map_BHNN.shape
    expanded, radius = expand_EH.shape[0], kernel_E1kk.shape[-1] // 2
    out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
    with torch.autocast(map_BHNN.device.type, enabled=False):
        for tile in tiles(batch, tokens, expanded, map_BHNN.device, radius):
            map_bHRN = map_BHNN[tile.images, :, tile.reach].to(precision)
            images = len(map_bHRN)
            wide_bLE = torch.baddbmm(bias1_E, map_bHRN.flatten(2).mT, expand_EH.T.expand(images, -1, -1))
            u1_bERN = wide_bLE.clamp_(0, 6).unflatten(1, (-1, tokens)).permute(0, 3, 1, 2)
            u2_bERN = convolve(u1_bERN, kernel_E1kk, tile, expanded, bias2_E).clamp_(0, 6)
            u2_bLE = u2_bERN.permute(0, 2, 3, 1).flatten(1, 2)
            identity_bHL = torch.addcmul(shift_H, map_bHRN[:, :, tile.inner].flatten(2), gain_H)
            refined_bHL = identity_bHL.baddbmm_(project_HE.expand(images, -1, -1), u2_bLE.mT)
            value_bHNd = value_BHNd[tile.images].to(precision)
            out_BHNd[tile.images, :, tile.rows] = refined_bHL.unflatten(2, (-1, tokens)) @ value_bHNd
    return out_BHNd
