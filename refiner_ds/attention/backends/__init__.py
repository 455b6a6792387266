"""The backends of refined attention; they agree to rounding.

    eager            every map materialised, under autograd: any case
    eager compiled   the same through torch.compile
    tiled            tiles of query rows, no expanded map saved; on any device
    triton           kernels on a GPU, saving what tiled saves

dispatch.py asks them in turn, the requested one first.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from refiner_ds.attention.first_order import is_transformed
from refiner_ds.attention.weights import Case, DeferredMap

__all__ = ["Backend", "unsupported_call"]


class Backend(Protocol):
    """One implementation of every operation."""

    name: str

    def runs_on(self, device: torch.device) -> str | None:
        """The reason why it cannot run on this device, as the end of "because …", or ``None`` if it can."""

    def supports(self, case: Case) -> str | None:
        """The reason why it does not compute this case, as the end of "because …", or ``None`` if it does.

        Raises:
            TypeError: the case's weights are of no known kind.
        """

    def make_map(self, deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
        """softmax(scale·QKᵀ) + scale·residual, with dropout, [B, H, N, N] in the queries' dtype."""

    def attend(
        self, deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``attention.attend``: map times values [B, H, N, d], and the map [B, H, N, N]."""

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        """As ``attention.refine``: refined maps times values, [B, M, N, d]."""


def unsupported_call(case: Case) -> str | None:
    """The reason why only the eager backend computes a call, whatever its operation, or ``None``."""
    if torch.compiler.is_compiling():
        dropout = case.attn.dropout if isinstance(case.attn, DeferredMap) else 0.0
        return "compiled dropout is implemented there alone" if dropout else None
    if len(case.value_BHNd) == 0:
        return "the batch is empty"
    if is_transformed():
        return "torch.func transforms and forward mode are implemented there alone"
    if not torch.amp.is_autocast_available(case.value_BHNd.device.type):
        return f"{case.value_BHNd.device.type} tensors have no autocast"
    return None
