"""The backend "eager compiled": eager's equations through torch.compile, which joins pointwise operations into kernels.

    norms' running statistics ──copied──> compiled(maps or q and k, values, weights) ──> out
                              <──copied back, in passes that count──┘

What is compiled updates copies. So the first pass of a checkpoint and its recomputation are one and the same code, and
save the same tensors. On a GPU the first call takes seconds to tens of seconds; on a CPU as long, for a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from refiner_ds.attention.backends import unsupported_call
from refiner_ds.attention.backends.eager import EagerBackend
from refiner_ds.attention.compiling import keep_code_by_cpu
from refiner_ds.attention.norms import Norm, counted
from refiner_ds.attention.weights import Case, DeferredMap

__all__ = ["EagerCompiledBackend"]

COMPILER = "inductor"
EAGER = EagerBackend()


class EagerCompiledBackend:
    """See :class:`refiner_ds.attention.backends.Backend`."""

    name = "eager compiled"

    def runs_on(self, device: torch.device) -> str | None:
        if device.type == "cuda" and find_spec("triton") is None:
            return "Triton, by which torch.compile computes on a GPU, is not installed"
        return None

    def supports(self, case: Case) -> str | None:
        if torch.compiler.is_compiling():
            return "it is compiled with what is around it"
        return unsupported_call(case) or EAGER.supports(case)

    def make_map(self, deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
        return EAGER.make_map(deferred, residual_BHNN)

    def attend(
        self, deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _compiled(EAGER.attend)(deferred, value_BHNd, residual_BHNN)

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        pairs: list[tuple[Norm, Norm]] = []

        def copied(part: Any) -> Any:
            if not isinstance(part, Norm) or not part.training:
                return part
            batches = None if part.batches is None else part.batches.clone()
            copy = part._replace(
                running_mean=part.running_mean.clone(), running_var=part.running_var.clone(), batches=batches
            )
            pairs.append((part, copy))
            return copy

        weights = tree_map(copied, case.weights, is_leaf=lambda part: isinstance(part, Norm))
        with counted():
            out_BHNd = _compiled(EAGER.refine)(case._replace(weights=weights), scale, save_for_backward)
        with torch.no_grad():
            for norm, copy in pairs:
                if norm.updates:
                    norm.running_mean.copy_(copy.running_mean)
                    norm.running_var.copy_(copy.running_var)
                    if norm.batches is not None and copy.batches is not None:
                        norm.batches.copy_(copy.batches)
        return out_BHNd


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function through torch.compile, anew for every shape: a kernel for any shape is slower."""
    keep_code_by_cpu()
    return torch.compile(function, backend=COMPILER, dynamic=False)
