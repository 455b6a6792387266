"""Floating-point operations of the operators, for PyTorch's FLOP counter and for the planner's roofline.

An operator counts as what the eager composition multiplies: products of queries, keys, maps and values, and the
convolutions of a refiner, with 2 operations a multiplication and an addition. Backward counts twice its forward, and
what a backend computes again counts nothing, so that all backends count alike; only convolutions that were combined
into one before count as that one. Norms and softmax are left out, as PyTorch's own formulas leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from refiner_ds.attention.bottleneck import operators as _bottleneck  # noqa: F401  they define the operators
from refiner_ds.attention.linear import operators as _linear  # noqa: F401
from refiner_ds.attention.map import operators as _map  # noqa: F401

__all__ = ["flops_of"]

Shape = Sequence[int]
OPERATORS = torch.ops.refiner_ds


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of one call of an operator, PyTorch's or this project's; 0 for what only adds, copies or normalises.

    The backward of a convolution in groups is counted here: PyTorch's formula takes its weight gradient for that of a
    dense one, several hundred times too much where a refiner's kernels are depthwise.
    """
    if func is torch.ops.aten.convolution_backward.default:
        grad, inputs, weight, *_, transposed, _, _, output_mask = args
        positions = prod((inputs if transposed else grad).shape[2:])
        return sum(output_mask[:2]) * 2 * len(grad) * positions * weight.numel()
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _product(maps: Shape, width: int) -> int:
    """Of maps [B, M, N, N] made of, or multiplied with, vectors of so many numbers."""
    return 2 * prod(maps) * width


def _convolutions(entries: int, *weights: Shape | None) -> int:
    """Of 1×1 and depthwise convolutions over so many entries of maps of one channel."""
    return 2 * entries * sum(prod(weight) for weight in weights if weight is not None)


@register_flop_formula(OPERATORS.make_map)
def _make_map(backend: str, q: Shape, k: Shape, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, tokens, width = q
    return _product((batch, heads, tokens, k[2]), width)


@register_flop_formula(OPERATORS.make_map_backward)
def _make_map_backward(grad: Shape, backend: str, q: Shape, k: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * _make_map(backend, q, k)


@register_flop_formula(OPERATORS.attend)
def _attend(q: Shape, k: Shape, value: Shape, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _make_map("", q, k) + _product((*q[:3], k[2]), value[-1])


@register_flop_formula(OPERATORS.attend_backward)
def _attend_backward(
    grad: Shape | None, map_grad: Shape | None, q: Shape, k: Shape, value: Shape, *rest: Any, **kwargs: Any
) -> int:
    return 2 * (_make_map("", q, k) if grad is None else _attend(q, k, value))


@register_flop_formula(OPERATORS.refine_linear)
def _refine_linear(
    backend: str, scale: float, value: Shape, kernel: Shape, expand: Shape | None, reduce: Shape | None,
    source: Sequence[Shape], *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    batch, _, tokens, width = value
    made = _make_map("", *source) if len(source) == 2 else 0
    maps_out = (kernel if reduce is None else reduce)[0]
    multiplied = _product((batch, maps_out, tokens, tokens), width)
    return made + _convolutions(batch * tokens**2, expand, kernel, reduce) + multiplied


@register_flop_formula(OPERATORS.refine_linear_backward)
def _refine_linear_backward(grad: Shape, *arguments: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _refine_linear(*arguments)


@register_flop_formula(OPERATORS.refine_bottleneck)
def _refine_bottleneck(
    backend: str, scale: float, eps: Sequence[float], maps: Shape, value: Shape, expand: Shape, kernel: Shape,
    reduce: Shape, *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    entries = maps[0] * maps[2] * maps[3]
    return _convolutions(entries, expand, kernel, reduce) + _product(maps, value[-1])


@register_flop_formula(OPERATORS.refine_bottleneck_backward)
def _refine_bottleneck_backward(grad: Shape, *arguments: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _refine_bottleneck(*arguments)


@register_flop_formula(OPERATORS.refine_folded)
def _refine_folded(
    backend: str, maps: Shape, value: Shape, expand: Shape, bias1: Shape, kernel: Shape, bias2: Shape, reduce: Shape,
    *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return _refine_bottleneck(backend, 1.0, (), maps, value, expand, kernel, reduce)
