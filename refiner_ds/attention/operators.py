"""The operators of refined attention, opaque to PyTorch's compiler, exporter and dispatcher, in ``refiner_ds::``.

    make_map, attend             map/operators.py
    refine_linear                linear/operators.py
    refine_bottleneck, refine_folded   bottleneck/operators.py

Each has a fake implementation, so that shapes, dtypes and strides are known without computing, and a backward that is
an operator itself, written by hand. ``backend`` is "tiled" or "triton".
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from refiner_ds.attention.first_order import REFUSAL

__all__ = ["IMPLEMENTATIONS", "Operator", "computed_by", "empty_maps", "operator", "refuse_second_derivative"]

Operator = Callable[..., Any]
# Operator by its full name -> what computes it, for those who want to know what it allocates on its way.
IMPLEMENTATIONS: dict[str, Operator] = {}


def operator(name: str, schema: str) -> Callable[[Operator], Any]:
    """Decorator that makes a function the operator ``refiner_ds::name``; it must not mutate or return arguments."""

    def register(function: Operator) -> Any:
        IMPLEMENTATIONS[f"refiner_ds::{name}"] = function
        return torch.library.custom_op(f"refiner_ds::{name}", mutates_args=(), schema=schema)(function)

    return register


def computed_by(operation: str, module: str) -> Any:
    """The module that computes an operation: an operator is given its backend by name, and depends on none.

    Modules that compute also call operators, those of other operations and their own, so that they depend on these.
    """
    return import_module(f"refiner_ds.attention.{operation}.{module}")


def refuse_second_derivative(backward: Any) -> None:
    """Let differentiating through a backward operator be refused, rather than missing without a word."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(REFUSAL)

    backward.register_autograd(refuse, setup_context=setup_context)


def empty_maps(backend: str, like_BHNN: Tensor, maps: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Maps as a backend lays them out, uninitialised: [B, ``maps``, N, N], contiguous, or for kernels padded."""
    batch, heads, tokens = like_BHNN.shape[:3]
    if backend == "triton":
        from refiner_ds.attention.kernels.padded import empty_padded

        return empty_padded(like_BHNN, maps, dtype)
    return like_BHNN.new_empty(batch, maps or heads, tokens, tokens, dtype=dtype)
