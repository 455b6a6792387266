"""Bytes alive at once and operations, counted on fake tensors: what a computation would take before it is run.

with FakeTensorMode(), LiveBytes(gpu=False) as live:
    ...                              live.now, live.peak: bytes, workspace of this project's operators included
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from refiner_ds.attention.flops import flops_of
from refiner_ds.attention.operators import IMPLEMENTATIONS
from refiner_ds.attention.tiling import tiles as tiling
from refiner_ds.attention.tiling.tiles import GPU_TILE_BYTES

__all__ = ["LiveBytes", "Operation"]

SET_STORAGE = torch.ops.aten.set_.source_Storage_storage_offset
# Arguments of the operators that have an entry for every image.
PER_IMAGE = {"map", "q", "k", "value", "residual", "grad", "map_grad", "lse", "source", "activations"}

_WORKSPACES: dict[str, tuple[int, int]] = {}  # bytes for one image and for two, by operator and arguments


@dataclass(frozen=True)
class Operation:
    """One operation: whether backward runs it, its floating-point operations, and the bytes of its tensors."""

    backward: bool
    flops: int
    bytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their first use to their end."""

    def __init__(self, gpu: bool, look_inside: bool = True) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.backward = False
        self.operations: list[Operation] = []
        self._gpu, self._look_inside = gpu, look_inside
        self._known: weakref.WeakKeyDictionary[Any, weakref.finalize[..., Any] | None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = func.namespace == "refiner_ds"
        with _cache_off() if ours or func is SET_STORAGE else nullcontext():
            out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.add(tensor)
        if not self._look_inside:
            return out
        if ours:
            self.peak = max(self.peak, self.now + self._workspace(func, args, kwargs))
        if "empty" not in func.__name__ and _writes(func, args, kwargs, made):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + made
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.operations.append(Operation(self.backward, flops_of(func, args, kwargs, out), moved))
        return out

    def know(self, tensor: Tensor) -> None:
        """Take a tensor for one that was there before."""
        self._known[tensor.untyped_storage()] = None

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = weakref.finalize(storage, self._end, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no longer, though it lives."""
        end = self._known.get(tensor.untyped_storage())
        if end is not None:
            end()

    def _end(self, size: int) -> None:
        self.now -= size

    def _workspace(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Bytes that an operator of this project allocates on its way, beyond what it returns.

        Its own code runs on fake tensors of one and of two images, and what two add is added for every further one.
        """
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tile_bytes = GPU_TILE_BYTES if self._gpu else tiling.CPU_TILE_BYTES
        key = f"{func} {self._gpu} {tile_bytes} {[_of_one_image(name, value) for name, value in given.items()]}"
        if key not in _WORKSPACES:
            function = IMPLEMENTATIONS[func._schema.name]
            one, two = (self._inside(function, given, few, tile_bytes) for few in (1, 2))
            _WORKSPACES[key] = one, two
        batch = next(len(x) for x in tree_leaves([given.get(n) for n in ("map", "q", "value")]) if x is not None)
        one, two = _WORKSPACES[key]
        return one + (two - one) * (batch - 1)

    def _inside(self, function: Callable[..., Any], given: dict[str, Any], few: int, tile_bytes: int) -> int:
        def cut(x: Any) -> Any:
            if not _has_images(x):
                return x
            if "triton" in given.values() and x.dim() == 4 and x.shape[-1] == x.shape[-2]:
                from refiner_ds.attention.kernels.padded import empty_padded

                return empty_padded(x[:few])
            return torch.empty_strided((few, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)

        inner = LiveBytes(self._gpu, look_inside=False)
        fewer = {name: tree_map(cut, value) if name in PER_IMAGE else value for name, value in given.items()}
        for tensor in tree_leaves(fewer):
            if isinstance(tensor, Tensor):
                inner.know(tensor)
        with inner, torch.no_grad(), _tiles_of(tile_bytes):
            out = [x for x in tree_leaves(function(**_by_position(function, fewer))) if isinstance(x, Tensor)]
        return max(
            0, inner.peak - sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in out}.values())
        )


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> bool:
    """Whether an operation moves bytes, rather than ask a tensor something or return another view of its storage."""
    given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    return func._schema.is_mutable or any(x.untyped_storage()._cdata not in given for x in made)


def _has_images(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 3


def _of_one_image(name: str, value: Any) -> list[Any]:
    """What of an argument decides how many bytes an operator takes for an image."""

    def of_one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = x.shape[1:] if name in PER_IMAGE and _has_images(x) else x.shape
        return tuple(shape), x.stride(), x.dtype

    return [of_one(x) for x in tree_leaves(value)]


@contextmanager
def _cache_off() -> Iterator[None]:
    """Inside, the cache of fake results is not used: its keys would keep alive a storage that is an argument."""
    fake = active_fake_mode()
    with disable_fake_tensor_cache(fake) if fake is not None else nullcontext():
        yield


@contextmanager
def _tiles_of(size: int) -> Iterator[None]:
    """Inside, tiles of CPU tensors, as fake ones are, are cut to so many bytes."""
    before, tiling.CPU_TILE_BYTES = tiling.CPU_TILE_BYTES, size
    try:
        yield
    finally:
        tiling.CPU_TILE_BYTES = before


def _by_position(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the function's own names, which carry axes where the operator's schema does not."""
    return dict(zip(inspect.signature(function).parameters, given.values(), strict=True))
