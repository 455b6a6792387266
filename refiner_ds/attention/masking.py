"""Padded sequences: what belongs to tokens that are padding is zero, and is not counted.

    mask_BN, True for a real token ──> outside_B1NN, True for a map's entries whose query or key is padding

A refined map must have nothing outside before the convolution (it would reach real neighbours), and nothing after it
(real neighbours have reached it). Zero values and zeroed output rows see to the latter.
Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_bytes", "outside_mask", "outside_rows", "real_entries", "zero_padding"]


def outside_mask(mask_BN: Tensor) -> Tensor:
    """The entries of a map whose query or key is padding, [B, 1, N, N] bool."""
    return ~(mask_BN[:, None, :, None] & mask_BN[:, None, None, :])


def outside_rows(mask_bN: Tensor, rows: slice) -> Tensor:
    """The same for some query rows, [b, 1, R, N]."""
    return ~(mask_bN[:, None, rows, None] & mask_bN[:, None, None, :])


def mask_bytes(mask_BN: Tensor) -> Tensor:
    """A mask as kernels read it."""
    return mask_BN.contiguous().view(torch.uint8)


def zero_padding(x_BHNd: Tensor, mask_BN: Tensor) -> Tensor:
    """Queries, keys, values or outputs with zeros for padding, whatever was there."""
    return x_BHNd.masked_fill(~mask_BN[:, None, :, None], 0.0)


def real_entries(mask_BN: Tensor) -> Tensor:
    """How many entries of one head's map are real, over the batch: the sum of squared lengths, float64, at least 1."""
    return mask_BN.sum(1).double().square().sum().clamp(min=1)
