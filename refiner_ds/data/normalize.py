"""Pixels as the model takes them: uint8 images to floats of zero mean and unit deviation, on the device.

Axes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
@torch.inference_mode(False)  # evaluation may be first, and training must be able to use them
def _affine(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    # Cached: copying numbers to a GPU waits for all work queued there.
    scale = torch.tensor([1 / (255 * part) for part in std], device=device)
    return scale, torch.tensor([-centre / part for centre, part in zip(mean, std, strict=True)], device=device)


def normalize(
    images_BHWC: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], dtype: torch.dtype
) -> Tensor:
    """uint8 pixels [B, H, W, 3] to (pixel/255 − mean)/std, [B, 3, H, W] in ``dtype``, channels last in memory."""
    scale, shift = _affine(mean, std, images_BHWC.device)
    return torch.addcmul(shift, images_BHWC.float(), scale).to(dtype).permute(0, 3, 1, 2)
