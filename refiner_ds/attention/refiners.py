"""Every kind of refiner, one row each: its name, its equations, and what implements it without expanded maps.

A row names modules rather than functions, so that Triton is imported only where kernels run. docs/developing.md adds a
refiner as an example.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from refiner_ds.attention.bottleneck.eager import folded_map
from refiner_ds.attention.bottleneck.eager import refined_map as bottleneck_map
from refiner_ds.attention.checks import check_bottleneck, check_folded, check_linear
from refiner_ds.attention.linear.eager import refined_map as linear_map
from refiner_ds.attention.weights import BottleneckWeights, Case, FoldedWeights, LinearWeights, RefinerWeights

__all__ = ["REFINERS", "Implementation", "Refiner", "implementation", "load_implementations", "refiner_of"]

PACKAGE = "refiner_ds.attention"


class Implementation(Protocol):
    """What a module named in a row defines."""

    def supports(self, case: Case) -> str | None:
        """The reason why it does not compute this case, as the end of "because …", or ``None`` if it does."""

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        """Refined maps times values, [B, M, N, d] in the values' dtype; M is the number of refined maps."""


class Refiner(NamedTuple):
    """One kind of refiner.

    Args:
        name: in messages and log lines.
        eager: maps [B, H, N, N], weights and scale to refined maps [B, M, N, N], under autograd; and, where it
            ``takes_mask``, the mask of real tokens [B, N] or ``None``.
        tiled, triton: modules that are :class:`Implementation`\\ s, by name; ``None`` where there is none.
        check: raises ValueError for weights that do not fit each other or the maps.
        takes_mask: whether it is defined for padded sequences.
    """

    name: str
    eager: Callable[..., Tensor]
    tiled: str | None = None
    triton: str | None = None
    check: Callable[[Any, Case], None] | None = None
    takes_mask: bool = False


_BOTTLENECK = f"{PACKAGE}.bottleneck.tiled", f"{PACKAGE}.bottleneck.triton"

# Type of the weights -> row.
REFINERS: dict[type, Refiner] = {
    LinearWeights: Refiner(
        "linear", linear_map, f"{PACKAGE}.linear.tiled", f"{PACKAGE}.linear.triton", check_linear, True
    ),
    BottleneckWeights: Refiner("bottleneck", bottleneck_map, *_BOTTLENECK, check_bottleneck, True),
    FoldedWeights: Refiner("folded bottleneck", folded_map, *_BOTTLENECK, check_folded, True),
}


# Modules that rows name, once they are imported.
_loaded: dict[str, Implementation] = {}


def refiner_of(weights: RefinerWeights) -> Refiner:
    """The row of these weights.

    Raises:
        TypeError: there is none.
    """
    row = REFINERS.get(type(weights))
    if row is None:
        known = ", ".join(kind.__name__ for kind in REFINERS)
        raise TypeError(f"no refiner has weights of type {type(weights).__name__}; there are {known}")
    return row


def implementation(weights: RefinerWeights, backend: str) -> Implementation | None:
    """What computes a refiner with these weights by "tiled" or "triton", if anything does."""
    row = refiner_of(weights)
    module = row.tiled if backend == "tiled" else row.triton
    if module is None:
        return None
    if module not in _loaded:
        _load(module)
    return _loaded[module]


def load_implementations(backend: str) -> None:
    """Import every row's module for a backend: a compiler does not import."""
    for row in REFINERS.values():
        module = row.tiled if backend == "tiled" else row.triton
        if module is not None and module not in _loaded:
            _load(module)


def _load(module: str) -> None:
    _loaded[module] = cast(Implementation, import_module(module))
