"""Operations on a tile of maps: products over heads, and the pieces of batch norms.

    [b, H, R, N] ─ expand ─> [b, E, R, N], E last in memory ─ affine, moments, gradient_sums ─ reduce ─> [b, H, R, N]

Everything computes in its arguments' dtype, and sums in fp32 or better. ``product_dtype`` says in which dtype maps in
half precision are multiplied; on CPU their norms go through PyTorch's batch-norm kernel, which reads halves once.
Axes: b images and R query rows of a tile, H heads, E expanded maps, C either, N tokens, L = R·N.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention.norms import statistics_dtype

__all__ = [
    "affine",
    "combine",
    "correlate",
    "cpu_multiplies_bf16",
    "gradient_sums",
    "joint_moments",
    "moments",
    "reduce",
    "product_dtype",
    "real_moments",
    "total",
    "expand",
]


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16, and oneDNN may use them."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of tensors like ``x`` take their factors: bf16 where hardware has it, else fp32.

    Sums within a product are fp32 or better either way. The choice is internal to a tile: neither the dtype of a result
    nor the bytes saved for backward may depend on it.
    """
    if x.device.type != "cpu":
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and cpu_multiplies_bf16() else statistics_dtype(x.dtype)


def expand(x_bHRN: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """H maps combined to E, [b, E, R, N] with E last in memory, the fast layout for depthwise convolution.

    Args:
        x_bHRN: the maps.
        weight_EH, bias_E: in their dtype.
    """
    shape = (len(x_bHRN), *weight_EH.T.shape)
    x_bLH, weight_bHE = x_bHRN.flatten(2).mT, weight_EH.T.expand(shape)
    expanded_bLE = torch.bmm(x_bLH, weight_bHE) if bias_E is None else torch.baddbmm(bias_E, x_bLH, weight_bHE)
    return expanded_bLE.unflatten(1, x_bHRN.shape[2:]).permute(0, 3, 1, 2)


def reduce(x_bERN: Tensor, weight_HE: Tensor) -> Tensor:
    """Expanded maps combined to H maps, [b, H, R, N] with N last in memory; theirs is E."""
    x_bLE = x_bERN.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.bmm(weight_HE.expand(len(x_bLE), -1, -1), x_bLE.mT).unflatten(2, x_bERN.shape[2:])


def correlate(x_bHRN: Tensor, expanded_bERN: Tensor) -> Tensor:
    """Products of H and E maps summed over all entries, [H, E]; the second have E last in memory."""
    by_image_bHE = torch.bmm(x_bHRN.flatten(2), expanded_bERN.permute(0, 2, 3, 1).flatten(1, 2))
    return by_image_bHE.sum(0, dtype=statistics_dtype(x_bHRN.dtype))


def _by_norm_kernels(x: Tensor) -> bool:
    """Whether PyTorch's batch-norm kernel is used; in fp32 it is no faster, and sums less exactly."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


@cache
def _standard(maps: int) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1."""
    return torch.zeros(maps), torch.ones(maps)


def _entries(x_bCRN: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tile in fp32 or better, flattened as far as its memory allows, and the axes to sum over."""
    x_bCRN = x_bCRN.to(statistics_dtype(x_bCRN.dtype))
    if x_bCRN.stride(1) == 1 and x_bCRN.shape[1] > 1:  # of a single map any stride can be 1
        return x_bCRN.permute(0, 2, 3, 1).flatten(0, 2), (0,)
    return x_bCRN.flatten(2), (0, 2)


def _packed(x_bCRN: Tensor) -> Tensor:
    """The tile contiguous in its format: a slice would fall on the batch-norm kernel's slow path."""
    return x_bCRN if x_bCRN.is_contiguous(memory_format=torch.channels_last) else x_bCRN.contiguous()


def affine(x_bCRN: Tensor, gain_C: Tensor | None, shift_C: Tensor) -> Tensor:
    """x·gain + shift, rounded once; gain (``None`` for 1) and shift in fp32 or better."""
    if _by_norm_kernels(x_bCRN):
        return F.batch_norm(_packed(x_bCRN), *_standard(len(shift_C)), gain_C, shift_C, eps=0.0)
    exact_bCRN, shift_C11 = x_bCRN.to(shift_C.dtype), shift_C[:, None, None]
    if gain_C is None:
        return (exact_bCRN + shift_C11).to(x_bCRN.dtype)
    return torch.addcmul(shift_C11, exact_bCRN, gain_C[:, None, None]).to(x_bCRN.dtype)


def combine(level_H: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Σ gain [H]·maps [b, H, R, N] + level [H], rounded once; gains and level in fp32 or better."""
    (first_bHRN, gain_H), *others = terms
    sum_bHRN = first_bHRN.to(gain_H.dtype, copy=True).mul_(gain_H[:, None, None])
    for x_bHRN, gain_H in others:
        sum_bHRN.addcmul_(x_bHRN.to(gain_H.dtype), gain_H[:, None, None])
    return sum_bHRN.add_(level_H[:, None, None]).to(first_bHRN.dtype)


def total(x_bCRN: Tensor) -> Tensor:
    """The sum of each map's entries, [C], in fp32 or better."""
    entries, axes = _entries(x_bCRN)
    return entries.sum(axes)


def moments(x_bCRN: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each map's entries, and the sum of squares about it, [C] each, in fp32 or better."""
    entries, axes = _entries(x_bCRN)
    mean = entries.mean(axes, keepdim=True)
    return mean.flatten(), (entries - mean).square_().sum(axes)


def gradient_sums(grad_bCRN: Tensor, x_bCRN: Tensor, mean_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of grad and of grad·(x − mean) over each map's entries, [C] each, in fp32 or better."""
    (grad, axes), (x, _) = _entries(grad_bCRN), _entries(x_bCRN)
    alone_C = grad.sum(axes)
    return alone_C, ((grad * x).sum(axes).double() - mean_C.double() * alone_C.double()).to(alone_C.dtype)


def joint_moments(one_bHRN: Tensor, other_bHRN: Tensor) -> tuple[Tensor, Tensor]:
    """Means of two tensors of H maps, [2, H], and sums of products about these means, [2, 2, H]."""
    (mean1_H, square1_H), (mean2_H, square2_H) = moments(one_bHRN), moments(other_bHRN)
    cross_H = gradient_sums(one_bHRN, other_bHRN, mean2_H)[1]
    comoment_4H = torch.stack((square1_H, cross_H, cross_H, square2_H))
    return torch.stack((mean1_H, mean2_H)), comoment_4H.unflatten(0, (2, 2))


def real_moments(outside_b1RN: Tensor, *tiles_bCRN: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of K tensors of C maps, over their real entries: how many of a map, means [K, C], comoments [K, K, C]."""
    count = int((~outside_b1RN).sum())
    x_KbCRN = torch.stack([x.to(statistics_dtype(x.dtype)) for x in tiles_bCRN])
    mean_KC = x_KbCRN.masked_fill(outside_b1RN, 0.0).sum((1, 3, 4)) / max(count, 1)
    centred_KbCRN = (x_KbCRN - mean_KC[:, None, :, None, None]).masked_fill_(outside_b1RN, 0.0)
    return count, mean_KC, torch.einsum("kbcrn,lbcrn->klc", centred_KbCRN, centred_KbCRN)
