"""How kernels lay stacks of maps in memory: every row begins at 16 bytes, and zeros fill it up to the next.

    [B, C, N, N]: entry (b, c, r, k) lies at 8 + ((b·C + c)·N + r)·S + k, where S is N rounded up to a multiple of 8

Rows of 197 halves laid end to end could be read two bytes at a time only, and instructions, not bytes, would bound most
kernels. Whoever writes a stack writes the zeros, and whoever reads one counts on them; no other tensor is taken for one
of these, since no other lies 8 entries into a storage of just this size.
Axes: B batch, C maps of a stack, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ALIGNED", "empty_stack", "entries_of_parts", "laid_out", "lies_so", "row_stride"]

ALIGNED = 8  # entries: 16 bytes in half precision


def row_stride(tokens: int) -> int:
    """S, from row to row."""
    return -(-tokens // ALIGNED) * ALIGNED


def entries_of_parts(tokens: int, length: int, device: torch.device) -> Tensor:
    """Of a map's N·S places cut into parts of ``length``, how many of each are entries, not zeros; int64."""
    stride = row_stride(tokens)
    cuts = torch.arange(0, tokens * stride + length, length, device=device).clamp(max=tokens * stride)
    return (cuts // stride * tokens + (cuts % stride).clamp(max=tokens)).diff()


def empty_stack(like_BCN: Tensor, maps: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A stack to be written, zeros behind rows too: [B, ``maps``, N, N]; maps and dtype of ``like`` if None."""
    batch, like_maps, tokens = like_BCN.shape[:3]
    maps, stride = maps or like_maps, row_stride(tokens)
    memory = like_BCN.new_empty(ALIGNED + batch * maps * tokens * stride, dtype=dtype)
    # Not a view, which autograd would hand on with its history.
    stack_BCNN = memory.new_empty(0)
    shape, strides = (batch, maps, tokens, tokens), (maps * tokens * stride, tokens * stride, stride, 1)
    return stack_BCNN.set_(memory.untyped_storage(), ALIGNED, shape, strides)


def lies_so(x_BCNN: Tensor) -> bool:
    """Whether a stack is laid out already."""
    batch, maps, tokens, _ = x_BCNN.shape
    stride = row_stride(tokens)
    size = (ALIGNED + batch * maps * tokens * stride) * x_BCNN.element_size()
    strides = (maps * tokens * stride, tokens * stride, stride, 1)
    # An axis of length 1 may have any stride.
    same = all(one == 1 or a == b for one, a, b in zip(x_BCNN.shape, x_BCNN.stride(), strides, strict=True))
    return bool(same and x_BCNN.storage_offset() == ALIGNED and x_BCNN.untyped_storage().nbytes() == size)


def laid_out(x_BCNN: Tensor) -> Tensor:
    """The same stack as kernels read it: itself where it lies so, otherwise a copy."""
    if lies_so(x_BCNN):
        return x_BCNN
    stack_BCNN, (batch, maps, tokens, _) = empty_stack(x_BCNN), x_BCNN.shape
    strides = stack_BCNN.stride()
    torch.as_strided(stack_BCNN, (batch, maps, tokens, strides[2]), strides)[..., tokens:].zero_()
    return stack_BCNN.copy_(x_BCNN)
