"""The equations of the refiner, one function an equation: plain, any dtype, the truth that tests compare with.

    A = softmax(QKᵀ/√d) [B,H,N,N] ── expand ── local ── reduce ──> refined maps, times V ──> [B,H,N,d]

"Paper" is *Refiner: Refining Self-attention for Vision Transformers* (arXiv 2106.03714); "released" is the form of its
published models. Axes: B batch, H heads, E expanded maps, N tokens (class token first), d head width, h×w patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention.masking import outside_mask
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.weights import CONSTRAINTS, LocalKernels

__all__ = [
    "accumulate",
    "attend",
    "attention_map",
    "batch_moments",
    "bottleneck",
    "compose_kernel",
    "dense_refiner",
    "distributed_local_attention",
    "expand",
    "linear_refiner",
    "local_attention",
    "local_over_grid",
    "normalize",
    "reduce",
    "refined_by_shifts",
    "row_and_column_local_attention",
    "spatial_local_attention",
]


def attention_map(q_BHNd: Tensor, k_BHNd: Tensor, scale: float, mask_BN: Tensor | None = None) -> Tensor:
    """Softmax attention map, softmax(scale·QKᵀ) over the keys (paper, eq. 1); over the real ones under a mask.

    Returns:
        [B, H, N, N] in fp32 for half-precision queries, otherwise in theirs.
    """
    logits_BHNN = (q_BHNd @ k_BHNd.mT) * scale
    logits_BHNN = logits_BHNN.to(statistics_dtype(logits_BHNN.dtype))
    if mask_BN is None:
        return logits_BHNN.softmax(-1)
    # The least finite number, not −∞: a sequence of padding alone would be divided by zero.
    least = torch.finfo(logits_BHNN.dtype).min
    map_BHNN = logits_BHNN.masked_fill(~mask_BN[:, None, None, :], least).softmax(-1)
    return map_BHNN.masked_fill(outside_mask(mask_BN), 0.0)


def accumulate(map_BHNN: Tensor, residual_BHNN: Tensor, scale: float) -> Tensor:
    """Residual attention maps (released): the block's own map plus scale times that of the block before."""
    return map_BHNN + scale * residual_BHNN


def expand(map_BHNN: Tensor, weight_EH: Tensor) -> Tensor:
    """Attention expansion (paper, section 3.2): each of E maps is a linear combination of the H heads'.

    A 1×1 convolution over heads: unlike a matrix product it leaves the maps in the memory order of every later step.

    Returns:
        [B, E, N, N].
    """
    return F.conv2d(map_BHNN, weight_EH[:, :, None, None])


def distributed_local_attention(map_BENN: Tensor, kernel_E1kk: Tensor) -> Tensor:
    """Distributed local attention (paper, section 3.3): every map is convolved with its own kernel.

    The kernel slides over the (query, key) plane, zero outside; class tokens are convolved like any other.

    Returns:
        [B, E, N, N].
    """
    rows, columns = kernel_E1kk.shape[-2:]
    padding = (rows // 2, columns // 2)
    return F.conv2d(map_BENN, kernel_E1kk, padding=padding, groups=kernel_E1kk.shape[0])


def reduce(map_BENN: Tensor, weight_HE: Tensor) -> Tensor:
    """Attention reduction (paper, section 3.2): E expanded maps back to H.

    Returns:
        [B, H, N, N].
    """
    return F.conv2d(map_BENN, weight_HE[:, :, None, None])


def linear_refiner(map_BHNN: Tensor, expand_EH: Tensor, kernel_E1kk: Tensor, reduce_HE: Tensor) -> Tensor:
    """The paper's refiner: expansion, distributed local attention, reduction.

    Returns:
        [B, H, N, N]; its rows no longer sum to one.
    """
    return reduce(distributed_local_attention(expand(map_BHNN, expand_EH), kernel_E1kk), reduce_HE)


def compose_kernel(expand_EH: Tensor, kernel_E1kk: Tensor, reduce_HE: Tensor) -> Tensor:
    """The linear refiner as one dense kernel, W[o,i] = Σ_e reduce[o,e]·kernel[e]·expand[e,i].

    Returns:
        [H, H, k, k], output heads first.
    """
    return torch.einsum("oe,exy,ei->oixy", reduce_HE, kernel_E1kk.squeeze(1), expand_EH)


def dense_refiner(map_BHNN: Tensor, kernel_HHkk: Tensor) -> Tensor:
    """The linear refiner in its composed form: one dense convolution over the (query, key) plane."""
    return F.conv2d(map_BHNN, kernel_HHkk, padding="same")


def attend(map_BENN: Tensor, value_BHNd: Tensor) -> Tensor:
    """Maps times values; with r maps a head, maps r·h … r·h+r−1 share the values of head h.

    Returns:
        [B, E, N, d], [B, H, N, d] where E = H.
    """
    shares = map_BENN.shape[1] // value_BHNd.shape[1]
    return map_BENN @ (value_BHNd if shares == 1 else value_BHNd.repeat_interleave(shares, 1))


def refined_by_shifts(map_BHNN: Tensor, kernel_HHkk: Tensor, value_BHNd: Tensor) -> Tensor:
    """Refined maps times values without convolving a map: locally aggregate, then globally attend (paper, eq. 4).

    Exactly ``attend(dense_refiner(map, kernel), value)``: taps along the keys move onto the values, taps along the
    queries onto the output.

    Returns:
        [B, H, N, d].
    """
    radius = kernel_HHkk.shape[-1] // 2
    out_BHNd = torch.zeros_like(value_BHNd)
    for query_tap in range(-radius, radius + 1):
        inner_BHNd = torch.zeros_like(value_BHNd)
        for key_tap in range(-radius, radius + 1):
            mix_HH = kernel_HHkk[:, :, query_tap + radius, key_tap + radius]
            inner_BHNd = inner_BHNd + expand(map_BHNN, mix_HH) @ _shift(value_BHNd, key_tap)
        out_BHNd = out_BHNd + _shift(inner_BHNd, -query_tap)
    return out_BHNd


def _shift(x_BHNd: Tensor, tokens: int) -> Tensor:
    """Entry n of the result is entry n − tokens, zero outside."""
    size = x_BHNd.shape[-2]
    padded = F.pad(x_BHNd, (0, 0, max(tokens, 0), max(-tokens, 0)))
    return padded[..., :size, :] if tokens >= 0 else padded[..., -size:, :]


def batch_moments(map_BCNN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map over batch, queries and keys, [C] and [C]."""
    return map_BCNN.mean((0, 2, 3)), map_BCNN.var((0, 2, 3), correction=0)


def normalize(
    map_BCNN: Tensor, weight_C: Tensor, bias_C: Tensor, moments: tuple[Tensor, Tensor], eps: float = 1e-5
) -> Tensor:
    """Batch norm with given moments; eps is no trifle beside the variance of probabilities, it is part of the model."""
    mean_C, variance_C = moments
    gain_C = weight_C / (variance_C + eps).sqrt()
    return (map_BCNN - mean_C[:, None, None]) * gain_C[:, None, None] + bias_C[:, None, None]


def bottleneck(
    map_BHNN: Tensor,
    expand_EH: Tensor,
    kernel_E1kk: Tensor,
    reduce_HE: Tensor,
    affines: Sequence[tuple[Tensor, Tensor]],
    running: Sequence[tuple[Tensor, Tensor]] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The released refiner: an inverted bottleneck with an identity, and one more norm after the sum.

    Args:
        map_BHNN: the maps to refine.
        expand_EH, kernel_E1kk, reduce_HE: the three convolutions.
        affines: weight and bias of the four norms, in order.
        running: mean and variance of the four norms; ``None`` takes the batch's own, as in training.
        eps: added to every variance.
    Returns:
        The refined maps [B, H, N, N] (before the factor 1/√d), and the four (mean, biased variance) used.
    """
    used: list[tuple[Tensor, Tensor]] = []

    def norm(x: Tensor) -> Tensor:
        index = len(used)
        used.append(batch_moments(x) if running is None else running[index])
        return normalize(x, *affines[index], used[index], eps)

    expanded_BENN = F.relu6(norm(expand(map_BHNN, expand_EH)))
    local_BENN = F.relu6(norm(distributed_local_attention(expanded_BENN, kernel_E1kk)))
    refined_BHNN = norm(reduce(local_BENN, reduce_HE)) + map_BHNN
    return norm(refined_BHNN), used


def local_over_grid(map_BENN: Tensor, kernel_E1kk: Tensor, grid: tuple[int, int], axis: str) -> Tensor:
    """Convolve along one axis of the map, reshaped to its patch grid.

    With ``axis`` "keys" each query's row of the map becomes a picture of the patches it looks at, with "queries" each
    key's column a picture of the patches that look at it. Entries of class tokens along that axis stay as they are.

    Returns:
        [B, E, N, N].
    """
    if axis == "queries":
        return local_over_grid(map_BENN.mT, kernel_E1kk, grid, "keys").mT
    batch, maps, tokens, _ = map_BENN.shape
    classes = tokens - grid[0] * grid[1]
    pictures = map_BENN[..., classes:].transpose(1, 2).reshape(batch * tokens, maps, *grid)
    convolved = distributed_local_attention(pictures, kernel_E1kk)
    patches_BENP = convolved.reshape(batch, tokens, maps, tokens - classes).transpose(1, 2)
    return torch.cat((map_BENN[..., :classes], patches_BENP), -1)


def spatial_local_attention(map_BENN: Tensor, keys_E1kk: Tensor, queries_E1kk: Tensor, grid: tuple[int, int]) -> Tensor:
    """Local attention under the constraint "spatial" (paper, section 4.2): k×k on the keys' grid, then the queries'."""
    return local_over_grid(local_over_grid(map_BENN, keys_E1kk, grid, "keys"), queries_E1kk, grid, "queries")


def row_and_column_local_attention(
    map_BENN: Tensor, kernels: tuple[Tensor, Tensor, Tensor, Tensor], grid: tuple[int, int]
) -> Tensor:
    """Local attention under the constraint "row+col": 1×k and k×1 over the keys' grid, then over the queries'."""
    for kernel, axis in zip(kernels, ("keys", "keys", "queries", "queries"), strict=True):
        map_BENN = local_over_grid(map_BENN, kernel, grid, axis)
    return map_BENN


def local_attention(map_BENN: Tensor, local: LocalKernels) -> Tensor:
    """Distributed local attention under whichever constraint the kernels have, [B, E, N, N]."""
    if local.constraint == "none":
        return distributed_local_attention(map_BENN, local.kernels[0])
    if local.constraint == "spatial":
        keys_E1kk, queries_E1kk = local.kernels
        return spatial_local_attention(map_BENN, keys_E1kk, queries_E1kk, local.grid)
    if local.constraint == "row+col":
        rows, columns, query_rows, query_columns = local.kernels
        return row_and_column_local_attention(map_BENN, (rows, columns, query_rows, query_columns), local.grid)
    raise ValueError(f"constraint is {local.constraint!r}; it must be one of {', '.join(CONSTRAINTS)}")
