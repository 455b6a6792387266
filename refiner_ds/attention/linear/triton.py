"""The paper's refiner by kernels.

    q, k ─ softmax ─> A ─ heads mixed, shifted, times V ─> out      saved for backward: q, k, v, log-sum-exps, kernel
    q, k, log-sum-exps ─> A again ─> ∂V, ∂W;  g, V, W ─> ∂A ─> ∂q, ∂k

A is written once forward and once backward, in the queries' dtype, as work space of one layer; ∂A once. Bytes of maps
that move, of two-byte entries: forward 4 (2 for a given map), backward 12 (6).
Axes: B batch, H heads, M maps that multiply values (E expanded without reduction), N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.kernels.launch import unsupported_kernel_size
from refiner_ds.attention.kernels.padded import to_padded
from refiner_ds.attention.linear import operators, tiled
from refiner_ds.attention.linear.triton_backward import kernel_gradient, map_gradient
from refiner_ds.attention.linear.triton_forward import refined_attend
from refiner_ds.attention.map.triton import make_map
from refiner_ds.attention.map.triton_kernels import score_gradients, softmax_map
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.weights import Case, DeferredMap, LinearWeights

__all__ = ["dense_kernel", "gradients", "refine", "refined_values", "supports"]


def dense_kernel(weights: LinearWeights, scale: float) -> Tensor:
    """The whole refiner as one kernel, [M, H, k, k] in fp32 or better; constraint "none" only.

    Without expansion each map's own kernel is on the diagonal. ``scale`` is a factor on all of it.
    """
    kernel_E1kk = weights.local.kernels[0]
    kernel_E1kk = kernel_E1kk.to(statistics_dtype(kernel_E1kk.dtype))
    if scale != 1:  # inductor loses track of a factor of 1 inside an activation checkpoint
        kernel_E1kk = kernel_E1kk * scale
    if weights.expand_EH is None:
        return kernel_E1kk * torch.eye(len(kernel_E1kk), device=kernel_E1kk.device)[:, :, None, None]
    expand_EH = weights.expand_EH.to(kernel_E1kk.dtype)
    if weights.reduce_HE is None:
        return kernel_E1kk * expand_EH[:, :, None, None]
    with torch.autocast(kernel_E1kk.device.type, enabled=False):
        return equations.compose_kernel(expand_EH, kernel_E1kk, weights.reduce_HE.to(kernel_E1kk.dtype))


def refined_values(
    scale: float, value_BHNd: Tensor, kernel_MHkk: Tensor, source: list[Tensor], mask_BN: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Refined maps times values, [B, M, N, d], and row log-sum-exps if ``source`` is queries and keys, not a map."""
    if len(source) == 1:
        return refined_attend(source[0], value_BHNd, kernel_MHkk), None
    map_BHNN, lse_BHN = softmax_map(source[0], source[1], scale, mask_BN=mask_BN)
    return refined_attend(map_BHNN, value_BHNd, kernel_MHkk), lse_BHN


def gradients(
    grad_BMNd: Tensor, scale: float, value_BHNd: Tensor, kernel_MHkk: Tensor, source: list[Tensor], lse_BHN: Tensor,
    mask_BN: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Backward of :func:`refined_values`: of value, kernel, and the map or queries and keys."""
    if len(source) == 1:
        map_BHNN = to_padded(source[0])
    else:
        map_BHNN = softmax_map(source[0], source[1], scale, mask_BN=mask_BN)[0]
    d_value_BHNd = _value_gradient(map_BHNN, grad_BMNd, kernel_MHkk, value_BHNd)
    d_kernel_MHkk = kernel_gradient(map_BHNN, grad_BMNd, value_BHNd, kernel_MHkk.shape[-1])
    del map_BHNN
    d_map_BHNN = map_gradient(grad_BMNd, value_BHNd, kernel_MHkk)
    d_source = [d_map_BHNN]
    if len(source) > 1:
        d_source = list(score_gradients(source[0], source[1], lse_BHN, scale, d_map_BHNN, mask_BN=mask_BN)[:2])
    return [d_value_BHNd, d_kernel_MHkk, *d_source]


def _value_gradient(map_BHNN: Tensor, grad_BMNd: Tensor, kernel_MHkk: Tensor, value_BHNd: Tensor) -> Tensor:
    """Refined maps, transposed, times the gradient; summed over the maps that share a head's values."""
    heads, maps = value_BHNd.shape[1], grad_BMNd.shape[1]
    dtype = value_BHNd.dtype if maps == heads else statistics_dtype(value_BHNd.dtype)
    d_value_BMNd = refined_attend(map_BHNN.mT, grad_BMNd, kernel_MHkk.mT, dtype)
    summed_BHNd = d_value_BMNd if maps == heads else d_value_BMNd.unflatten(1, (heads, -1)).sum(2)
    return summed_BHNd.to(value_BHNd.dtype)


def supports(case: Case) -> str | None:
    """The reason why this case is left to another backend, or ``None``."""
    assert isinstance(case.weights, LinearWeights)
    return tiled.supports(case) or unsupported_kernel_size(case.weights.local)


def refine(case: Case, scale: float, save_for_backward: str) -> Tensor:
    """Refined maps times values, [B, M, N, d] in the values' dtype; there is no choice of what is saved.

    With dropout the map is made first and saved.
    """
    attn, value_BHNd, weights, _ = case
    assert isinstance(weights, LinearWeights)
    kernel_MHkk = dense_kernel(weights, scale)
    if isinstance(attn, DeferredMap) and attn.dropout:
        attn = make_map(attn).to(value_BHNd.dtype)
    return operators.refine_linear("triton", attn, value_BHNd, kernel_MHkk)
