"""The released refiner for inference, norms folded: one kernel that writes nothing expanded, and a matrix product.

    A ─ bottleneck_narrow.py ─> T ─ · V ─> out

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.fused.bottleneck_forward import nine_taps
from refiner_ds.attention.fused.bottleneck_narrow import narrow_maps
from refiner_ds.attention.weights import FoldedWeights

__all__ = ["refine_folded"]


@torch.no_grad()
def refine_folded(map_BHNN: Tensor, value_BHNd: Tensor, refiner: FoldedWeights) -> Tensor:
    """Refined maps times values, [B, H, N, d]; constraint "none" and kernels of size 1 or 3 only.

    Reads 2 bytes an element of the map (in half precision), writes and reads 2 for T.

    Args:
        map_BHNN: maps.
        value_BHNd: values in their dtype.
    """
    refined_BHNN, _ = narrow_maps(
        map_BHNN, refiner.expand_EH, refiner.bias1_E, nine_taps(refiner.local.kernels[0]), refiner.bias2_E,
        refiner.project_HE, torch.stack((refiner.gain_H, refiner.shift_H)), False,
    )  # fmt: skip
    with torch.autocast(map_BHNN.device.type, enabled=False):
        return refined_BHNN @ value_BHNd
