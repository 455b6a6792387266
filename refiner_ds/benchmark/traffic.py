"""Bytes that a step moves, counted operation by operation as PyTorch runs them, and kernel by kernel for Triton.

    an operation reads its tensors and writes its results: their bytes, a broadcast axis once, are what it moves
    views and empty tensors move nothing; in place is read and written; a Triton kernel moves each tensor once

This is what the operations ask of the memory system, not what reaches DRAM. All of eager's maps do, once they exceed
the caches; tiles should not. So operands are distinguished by the size of the storage they lie in: ``uncached`` counts
those in storages too large for a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Moved", "moved_bytes"]


class Moved(NamedTuple):
    """Bytes moved.

    Args:
        all: by every operation.
        uncached: of these, to and from storages larger than the cache.
    """

    all: int
    uncached: int


class _Traffic(TorchDispatchMode):
    def __init__(self, cache_bytes: int) -> None:
        super().__init__()
        self.cache_bytes, self.all, self.uncached = cache_bytes, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or "empty" in func.__name__ or func.__name__.startswith("detach"):
            return out
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
        inputs = [leaf for _, value in given for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        written = [
            leaf
            for argument, value in given
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        # What is only overwritten is not read.
        overwrites = func.__name__.startswith(("copy_", "fill_", "zero_", "bernoulli_"))
        read = [tensor for tensor in inputs if not (overwrites and any(tensor is one for one in written))]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if not any(tensor is one for one in inputs)]
        for tensor in (*read, *written, *fresh):
            self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        shape = zip(tensor.shape, tensor.stride(), strict=True)
        moved = tensor.element_size() * prod(size for size, stride in shape if stride)
        self.all += moved
        if tensor.untyped_storage().nbytes() > self.cache_bytes:
            self.uncached += moved


def moved_bytes(step: Callable[[], object], cache_bytes: int = 0) -> Moved:
    """What ``step`` moves, forward and backward alike; storages above ``cache_bytes`` count as uncached."""
    with ExitStack() as stack:
        launched: list[Any] = []
        if find_spec("triton") is not None:
            from refiner_ds.attention.kernels.launch import recording

            launched = stack.enter_context(recording())
        traffic = stack.enter_context(_Traffic(cache_bytes))
        step()
    kernels = sum(one.bytes for one in launched)
    return Moved(traffic.all + kernels, traffic.uncached + kernels)
