"""What a refiner saves for backward: the map alone, or two of its activations as well.

Only a bottleneck in training has the choice. Its activations are the inputs of its second and third norm, E + H maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["SAVE_FOR_BACKWARD", "assumed_memory", "check_save_for_backward", "resolve_save_for_backward"]

SAVE_FOR_BACKWARD = ("auto", "map", "activations")

# A network holds up to this many bottlenecks during a forward pass; their activations may take a quarter of memory.
ACTIVATIONS_SHARE = 1 / (4 * 16)


_assumed_bytes: int | None = None


@contextmanager
def assumed_memory(total: int) -> Iterator[None]:
    """Inside, every device is taken to have so many bytes: to decide as another machine would."""
    global _assumed_bytes
    before, _assumed_bytes = _assumed_bytes, total
    try:
        yield
    finally:
        _assumed_bytes = before


def check_save_for_backward(save_for_backward: str) -> str:
    """``save_for_backward`` itself.

    Raises:
        ValueError: it is none of :data:`SAVE_FOR_BACKWARD`.
    """
    if save_for_backward not in SAVE_FOR_BACKWARD:
        allowed = ", ".join(SAVE_FOR_BACKWARD)
        raise ValueError(f"save_for_backward is {save_for_backward!r}; it must be one of {allowed}")
    return save_for_backward


def resolve_save_for_backward(save_for_backward: str, map_BHNN: Tensor, expanded: int) -> str:
    """Either "map" or "activations": "auto" takes the faster activations wherever memory is plentiful.

    They are saved where those of one layer take at most 1/64 of the device's memory, so that a network's take at most a
    quarter.

    Args:
        map_BHNN: the map, as it is stored.
        expanded: E, the number of expanded maps.
    """
    if check_save_for_backward(save_for_backward) != "auto":
        return save_for_backward
    heads = map_BHNN.shape[1]
    activations_bytes = map_BHNN.numel() * map_BHNN.element_size() * (heads + expanded) // heads
    return "activations" if activations_bytes <= ACTIVATIONS_SHARE * _memory_bytes(map_BHNN.device) else "map"


@torch.compiler.assume_constant_result
def _memory_bytes(device: torch.device) -> int:
    if _assumed_bytes is not None:
        return _assumed_bytes
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
