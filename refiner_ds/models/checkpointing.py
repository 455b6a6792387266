"""What can be recomputed as one, and by which function, when activations are not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

__all__ = ["UNITS", "Checkpoint", "non_reentrant"]

Checkpoint = Callable[..., Any]

# How many blocks one checkpoint covers; a refiner's is set on the attention itself.
UNITS = {"pair": 2, "block": 1, "refiner": 0}


def non_reentrant(function: Callable[..., Any], *tensors: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint`` in its non-reentrant form, which hooks and partial backwards survive."""
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
