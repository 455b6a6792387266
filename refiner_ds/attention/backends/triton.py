"""The backend "triton": kernels on a GPU, or in Triton's interpreter on CPU tensors for tests.

Triton is imported when this backend is first asked for, since it takes a while and need not be installed.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from refiner_ds.attention.backends import unsupported_call
from refiner_ds.attention.refiners import implementation, refiner_of
from refiner_ds.attention.weights import Case, DeferredMap

__all__ = ["TritonBackend"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # and in the interpreter float64, for proofs


class TritonBackend:
    """See :class:`refiner_ds.attention.backends.Backend`."""

    name = "triton"

    def runs_on(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed"
        from refiner_ds.attention.kernels.launch import runs_on

        return None if runs_on(device) else f"kernels need a GPU, not {device}"

    def supports(self, case: Case) -> str | None:
        if not torch.compiler.is_compiling() and (reason := self.runs_on(case.value_BHNd.device)) is not None:
            return reason
        if (reason := unsupported_call(case)) is not None:
            return reason
        dtype = case.attn.q_BHNd.dtype if isinstance(case.attn, DeferredMap) else case.value_BHNd.dtype
        for one in (dtype, case.value_BHNd.dtype):
            if one not in DTYPES and not (one == torch.float64 and _interpreted()):
                return f"kernels take no {str(one).removeprefix('torch.')}"
        if case.weights is None:
            return None
        kernels = implementation(case.weights, self.name)
        return f"{refiner_of(case.weights).name} has no kernels" if kernels is None else kernels.supports(case)

    def make_map(self, deferred: DeferredMap, residual_BHNN: Tensor | None = None) -> Tensor:
        from refiner_ds.attention.map import triton

        return triton.make_map(deferred, residual_BHNN)

    def attend(
        self, deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        from refiner_ds.attention.map import triton

        return triton.attend(deferred, value_BHNd, residual_BHNN)

    def refine(self, case: Case, scale: float, save_for_backward: str) -> Tensor:
        assert case.weights is not None
        kernels = implementation(case.weights, self.name)
        assert kernels is not None
        return kernels.refine(case, scale, save_for_backward)


def _interpreted() -> bool:
    from refiner_ds.attention.kernels.launch import INTERPRETED

    return INTERPRETED
