"""The memory layout of maps for kernels: every row starts at a multiple of 16 bytes, and zeros pad it up to the next.

    [B, C, N, N]: entry (b, c, r, k) is at 8 + ((b·C + c)·N + r)·S + k, where S is N rounded up to a multiple of 8

Rows of 197 halves laid end to end could be read two bytes at a time only; instructions, not bytes, would then bound
most kernels. Who writes padded maps writes the zeros, and who reads them relies on them. A tensor is recognised by its
strides, an offset of 8 entries and a storage of exactly this size.
Axes: B batch, C maps, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ALIGNED",
    "empty_padded",
    "part_counts",
    "real_counts",
    "valid_counts",
    "to_padded",
    "is_padded",
    "row_stride",
]

ALIGNED = 8  # entries: 16 bytes in half precision


def row_stride(tokens: int) -> int:
    """S, from row to row."""
    return -(-tokens // ALIGNED) * ALIGNED


def valid_counts(tokens: int, length: int, device: torch.device) -> Tensor:
    """A map's N·S entries cut into parts of ``length``: how many of each are not padding, int64."""
    stride = row_stride(tokens)
    cuts = torch.arange(0, tokens * stride + length, length, device=device).clamp(max=tokens * stride)
    return (cuts // stride * tokens + (cuts % stride).clamp(max=tokens)).diff()


def real_counts(mask_BN: Tensor, length: int, steps: int) -> tuple[Tensor, Tensor]:
    """Of padded sequences, each image's entries cut into parts of ``steps`` times ``length``.

    Args:
        mask_BN: which tokens are real, bool.
    Returns:
        How many entries of each part are real, and the first step of a part that has any, or 0: [B · parts], int64.
    """
    tokens, stride = mask_BN.shape[1], row_stride(mask_BN.shape[1])
    parts = -(-tokens * stride // (length * steps))
    cuts = torch.arange(parts * steps + 1, device=mask_BN.device).mul(length).clamp(max=tokens * stride)
    before_BN = F.pad(mask_BN.cumsum(1), (1, 0))  # real tokens before each, and before the end
    whole_BC, begun_BC = before_BN[:, cuts // stride], before_BN[:, (cuts % stride).clamp(max=tokens)]
    entries_BC = whole_BC * before_BN[:, -1:] + F.pad(mask_BN, (0, 1))[:, cuts // stride] * begun_BC
    found_PS = entries_BC.diff().reshape(-1, steps)
    return found_PS.sum(1), (found_PS > 0).int().argmax(1)


def part_counts(map_BCNN: Tensor, mask_BN: Tensor | None, length: int, steps: int) -> tuple[Tensor, Tensor]:
    """What kernels divide by that measure each image's entries in parts of ``steps`` times ``length``.

    Returns:
        How many entries of each part are measured, and the first step that has any. Without a mask they are the same
        for every image, [parts], and the second is not to be read; with one, [B · parts].
    """
    if mask_BN is not None:
        return real_counts(mask_BN, length, steps)
    counts_P = valid_counts(map_BCNN.shape[-1], length * steps, map_BCNN.device)
    return counts_P, counts_P


def empty_padded(like_BCN: Tensor, maps: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised padded maps, [B, ``maps``, N, N], the padding too; maps and dtype of ``like`` where None."""
    batch, like_maps, tokens = like_BCN.shape[:3]
    maps, stride = maps or like_maps, row_stride(tokens)
    memory = like_BCN.new_empty(ALIGNED + batch * maps * tokens * stride, dtype=dtype)
    # Not a view: autograd would give it the history of ``memory``.
    padded_BCNN = memory.new_empty(0)
    shape, strides = (batch, maps, tokens, tokens), (maps * tokens * stride, tokens * stride, stride, 1)
    return padded_BCNN.set_(memory.untyped_storage(), ALIGNED, shape, strides)


def is_padded(x_BCNN: Tensor) -> bool:
    """Whether maps have this layout already."""
    batch, maps, tokens, _ = x_BCNN.shape
    stride = row_stride(tokens)
    size = (ALIGNED + batch * maps * tokens * stride) * x_BCNN.element_size()
    strides = (maps * tokens * stride, tokens * stride, stride, 1)
    # An axis of length 1 may have any stride.
    same = all(one == 1 or a == b for one, a, b in zip(x_BCNN.shape, x_BCNN.stride(), strides, strict=True))
    return bool(same and x_BCNN.storage_offset() == ALIGNED and x_BCNN.untyped_storage().nbytes() == size)


def to_padded(x_BCNN: Tensor) -> Tensor:
    """The same maps in this layout: themselves where they have it, otherwise a copy."""
    if is_padded(x_BCNN):
        return x_BCNN
    padded_BCNN, (batch, maps, tokens, _) = empty_padded(x_BCNN), x_BCNN.shape
    strides = padded_BCNN.stride()
    torch.as_strided(padded_BCNN, (batch, maps, tokens, strides[2]), strides)[..., tokens:].zero_()
    return padded_BCNN.copy_(x_BCNN)
