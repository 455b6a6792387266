"""The released refiner for inference: norms folded, one pass over tiles, no expanded map ever whole.

    A ─ expand, bias, clip ─ local, bias, clip ─ project, + gain·A + shift ─ · V ─> out, all of it tile by tile

Half-precision maps are expanded, clipped and convolved in fp32, where a rounded weight would cost most; from u2 on they
are multiplied as they are where hardware can.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.masking import outside_rows
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiling.ops import affine, expand, product_dtype, reduce
from refiner_ds.attention.tiling.tiles import convolve, tiles
from refiner_ds.attention.weights import FoldedWeights

__all__ = ["refine_folded"]


@torch.no_grad()
def refine_folded(
    map_BHNN: Tensor, value_BHNd: Tensor, refiner: FoldedWeights, mask_BN: Tensor | None = None
) -> Tensor:
    """Refined maps times values, [B, H, N, d]; constraint "none" only, and nothing for backward.

    Under a mask u1 is zero outside the real entries; maps and values of padding are zero already.
    """
    precision, dtype = statistics_dtype(map_BHNN.dtype), product_dtype(map_BHNN)
    expand_EH, bias1_E, kernel_E1kk, bias2_E, gain_H, shift_H = (
        tensor.to(precision)
        for tensor in (
            refiner.expand_EH, refiner.bias1_E, refiner.local.kernels[0], refiner.bias2_E, refiner.gain_H,
            refiner.shift_H,
        )
    )  # fmt: skip
    reduce_HE = refiner.reduce_HE.to(dtype)
    batch, _, tokens, _ = map_BHNN.shape
    expanded, radius = expand_EH.shape[0], kernel_E1kk.shape[-1] // 2
    out_BHNd = torch.empty_like(value_BHNd, memory_format=torch.contiguous_format)
    with torch.autocast(map_BHNN.device.type, enabled=False):
        for tile in tiles(batch, tokens, expanded, map_BHNN.device, radius):
            map_bHRN = map_BHNN[tile.images, :, tile.with_halo].to(dtype)
            u1_bERN = expand(map_bHRN.to(precision), expand_EH, bias1_E).clamp_(0, 6)
            if mask_BN is not None:
                u1_bERN.masked_fill_(outside_rows(mask_BN[tile.images], tile.with_halo), 0.0)
            u2_bERN = convolve(u1_bERN, kernel_E1kk, tile, expanded, bias2_E).clamp_(0, 6).to(dtype)
            refined_bHRN = reduce(u2_bERN, reduce_HE).add_(affine(map_bHRN[:, :, tile.interior], gain_H, shift_H))
            out_BHNd[tile.images, :, tile.rows] = refined_bHRN @ value_BHNd[tile.images].to(dtype)
    return out_BHNd
