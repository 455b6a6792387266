"""Refiners, maps and comparisons that the operator's tests share; float64 unless said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import BottleneckWeights, DeferredMap, LinearWeights, LocalKernels, Norm

# Batch, heads, tokens, ratio, kernel: one image, heads that are no power of two, odd and even tokens, large kernels.
SHAPES = [(3, 4, 9, 3, 3), (1, 3, 12, 2, 3), (2, 5, 7, 1, 5), (2, 2, 11, 4, 1)]
SCALE = 0.3


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal tensor that wants a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def maps(batch: int, heads: int, tokens: int) -> Tensor:
    """Attention maps that want a gradient."""
    return torch.randn(batch, heads, tokens, tokens).double().mul(2).softmax(-1).requires_grad_()


def scores(batch: int, heads: int, tokens: int, width: int = 5, dropout: float = 0.0) -> DeferredMap:
    """Queries and keys that want gradients."""
    return DeferredMap(leaf(batch, heads, tokens, width), leaf(batch, heads, tokens, width), SCALE, dropout)


def norm(count: int, training: bool = True) -> Norm:
    """A norm with statistics far from those of any map, so that eps and running statistics matter."""
    running = torch.rand(count).double(), torch.rand(count).double() + 0.1
    batches = torch.zeros((), dtype=torch.int64)
    return Norm(leaf(count), leaf(count), *running, batches, training)


def bottleneck(heads: int, ratio: int, kernel_size: int = 3, training: bool = True) -> BottleneckWeights:
    """A released refiner; both ends of its clips are reached."""
    wide = ratio * heads
    local = LocalKernels((leaf(wide, 1, kernel_size, kernel_size),), "none", (1, 1))
    norms = [norm(count, training) for count in (wide, wide, heads, heads)]
    with torch.no_grad():
        norms[0].weight.mul_(3)
        norms[1].weight.mul_(3)
    return BottleneckWeights(leaf(wide, heads), norms[0], local, norms[1], leaf(heads, wide), norms[2], norms[3])


def linear(heads: int, ratio: int, kernel_size: int = 3, expand: bool = True, reduce: bool = True) -> LinearWeights:
    """A paper refiner, with or without expansion and reduction."""
    wide = ratio * heads if expand else heads
    local = LocalKernels((leaf(wide, 1, kernel_size, kernel_size),), "none", (1, 1))
    return LinearWeights(leaf(wide, heads) if expand else None, local, leaf(heads, wide) if reduce and expand else None)


def on(device: torch.device, part):
    """A named tuple of tensors, and of such, on a device."""
    if isinstance(part, torch.Tensor):
        return part.detach().to(device).requires_grad_(part.requires_grad)
    if not isinstance(part, tuple):
        return part
    moved = [on(device, inner) for inner in part]
    return type(part)(*moved) if hasattr(part, "_fields") else tuple(moved)


def in_dtype(part, dtype: torch.dtype):
    """A named tuple of tensors, and of such, with its leaves in another dtype; running statistics stay as they are."""
    if isinstance(part, Tensor):
        return part.detach().to(dtype).requires_grad_(part.requires_grad) if part.requires_grad else part
    if not isinstance(part, tuple):
        return part
    made = [in_dtype(inner, dtype) for inner in part]
    return type(part)(*made) if hasattr(part, "_fields") else tuple(made)


def norms_of(refiner: BottleneckWeights) -> list[Norm]:
    """Its four norms."""
    return [refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H]


def leaves(*parts: object) -> list[Tensor]:
    """Every tensor in these and in the named tuples among them that wants a gradient."""
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found += [part] if part.requires_grad else []
        elif isinstance(part, tuple):
            found += leaves(*part)
    return found


def statistics(refiner: BottleneckWeights) -> list[Tensor]:
    """Copies of all running statistics and counts."""
    return [tensor.clone() for one in norms_of(refiner) for tensor in one[2:5]]


def restore(refiner: BottleneckWeights, before: list[Tensor]) -> None:
    """Put running statistics back."""
    for tensor, kept in zip([tensor for one in norms_of(refiner) for tensor in one[2:5]], before, strict=True):
        tensor.copy_(kept)


def relative_errors(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Largest difference over largest value, tensor by tensor."""
    assert [x.shape for x in ours] == [x.shape for x in truth]
    return [
        ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)).item()
        for one, other in zip(ours, truth, strict=True)
    ]


def forward_and_backward(attn, value, refiner, backend: str, direction: Tensor, **how) -> list[Tensor]:
    """The output, and the gradient of everything that wants one."""
    out = attention.refine(attn, value, refiner, SCALE, backend=backend, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves(attn, value, refiner), direction.to(out.dtype))]
