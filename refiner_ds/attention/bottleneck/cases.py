"""The cases of the released refiner, alike for tiles and kernels.

    in training         passes.py; saves A, or A and two activations
    in evaluation       folding.py, then the backend's inference; saves nothing

Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from refiner_ds.attention.bottleneck.folding import fold_refiner
from refiner_ds.attention.bottleneck.operators import refine_folded, refine_in_training
from refiner_ds.attention.saving import resolve_save_for_backward
from refiner_ds.attention.weights import BottleneckWeights, Case, DeferredMap, FoldedWeights

__all__ = ["refine_case", "unsupported_case"]


def unsupported_case(case: Case) -> str | None:
    """The reason why a case is left to the eager backend, or ``None``."""
    weights = case.weights
    assert isinstance(weights, BottleneckWeights | FoldedWeights)
    if weights.local.constraint != "none":
        return f"constraint {weights.local.constraint!r} is implemented there alone"
    if isinstance(weights, BottleneckWeights):
        modes = {norm.training for norm in (weights.norm1_E, weights.norm2_E, weights.norm3_H, weights.adapt_H)}
        if modes == {True}:
            return None
        if len(modes) == 2:
            return "some of its norms are in training mode and some are not"
    return "gradients through running statistics are implemented there alone" if case.wants_gradients() else None


def refine_case(
    backend: str, make_map: Callable[[DeferredMap], Tensor], case: Case, scale: float, save_for_backward: str
) -> Tensor:
    """Refined maps times values, [B, H, N, d] in the values' dtype, by "tiled" or "triton"."""
    attn, value_BHNd, weights, mask_BN = case
    map_BHNN = (make_map(attn) if isinstance(attn, DeferredMap) else attn).to(value_BHNd.dtype)
    if isinstance(weights, FoldedWeights):
        return refine_folded(backend, map_BHNN, value_BHNd, weights, mask_BN)
    assert isinstance(weights, BottleneckWeights)
    if not weights.norm1_E.training:
        return refine_folded(backend, map_BHNN, value_BHNd, fold_refiner(weights, scale), mask_BN)
    saved = resolve_save_for_backward(save_for_backward, map_BHNN, weights.expand_EH.shape[0])
    return refine_in_training(backend, map_BHNN, value_BHNd, weights, scale, saved == "activations", mask_BN)
