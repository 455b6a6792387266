"""Arguments of the operator that cannot be, refused in one sentence before anything is computed.

Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import (
    BottleneckWeights,
    Case,
    DeferredMap,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    kernel_shapes,
)

__all__ = ["check_bottleneck", "check_case", "check_folded", "check_linear"]


def check_case(case: Case, residual_BHNN: Tensor | None = None) -> None:
    """Refuse maps, queries, keys and values that do not fit together.

    Raises:
        ValueError: one sentence that names the argument and what it must be.
    """
    value_BHNd, attn = case.value_BHNd, case.attn
    if value_BHNd.dim() != 4 or 0 in value_BHNd.shape[1:]:
        raise ValueError(f"value has shape {_shape(value_BHNd)}; it must be [B, H, N, d], at least 1 but for B")
    batch, heads, tokens, _ = value_BHNd.shape
    tensors = {"value": value_BHNd}
    if isinstance(attn, DeferredMap):
        tensors |= {"q": attn.q_BHNd, "k": attn.k_BHNd}
        if attn.q_BHNd.dim() != 4 or attn.q_BHNd.shape[:3] != value_BHNd.shape[:3]:
            raise ValueError(
                f"q has shape {_shape(attn.q_BHNd)}; beside these values it must be {_row(value_BHNd)}, d]"
            )
        _require("k", attn.k_BHNd, tuple(attn.q_BHNd.shape), "like q")
        if not 0 <= attn.dropout <= 1:
            raise ValueError(f"dropout is {attn.dropout}; it must be between 0 and 1")
    else:
        tensors["attn"] = attn
        _require("attn", attn, (batch, heads, tokens, tokens), "beside these values")
    if residual_BHNN is not None:
        tensors["residual"] = residual_BHNN
        _require("residual", residual_BHNN, (batch, heads, tokens, tokens), "beside these values")
    if (mask_BN := attn.mask_BN if isinstance(attn, DeferredMap) else case.mask_BN) is not None:
        _check_mask(mask_BN, case)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be a floating dtype")
        if tensor.device != value_BHNd.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but value on {value_BHNd.device}; both must be on one device"
            )


def check_linear(weights: LinearWeights, case: Case) -> None:
    """Refuse a linear refiner's weights that do not fit each other, or the maps.

    Raises:
        ValueError: one sentence that names the weight and what it must be.
    """
    heads = case.value_BHNd.shape[1]
    expanded = heads if weights.expand_EH is None else len(weights.expand_EH)
    if weights.expand_EH is not None:
        _require("expand", weights.expand_EH, (expanded, heads), f"for {heads} heads")
    if weights.reduce_HE is not None:
        _require("reduce", weights.reduce_HE, (heads, expanded), f"for {heads} heads and {expanded} expanded maps")
    elif expanded % heads:
        raise ValueError(f"without reduction {expanded} expanded maps must be a multiple of {heads} heads")
    _check_local(weights.local, expanded, case)


def check_bottleneck(weights: BottleneckWeights, case: Case) -> None:
    """Refuse a bottleneck's weights that do not fit each other, or the maps, and training on a single entry.

    Raises:
        ValueError: one sentence that names the weight and what it must be.
    """
    batch, heads, tokens, _ = case.value_BHNd.shape
    expanded = len(weights.expand_EH)
    _require("expand", weights.expand_EH, (expanded, heads), f"for {heads} heads")
    _require("reduce", weights.reduce_HE, (heads, expanded), f"for {heads} heads and {expanded} expanded maps")
    _check_local(weights.local, expanded, case)
    norms: dict[str, tuple[Norm, int]] = {
        "norm1": (weights.norm1_E, expanded), "norm2": (weights.norm2_E, expanded),
        "norm3": (weights.norm3_H, heads), "adapt": (weights.adapt_H, heads),
    }  # fmt: skip
    for name, (norm, maps) in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            _require(f"{name}.{part}", getattr(norm, part), (maps,), f"for {maps} maps")
        if norm.training and batch * tokens == 1:
            raise ValueError(
                f"{name} cannot train on 1 image of 1 token: a variance needs more than one entry of a map"
            )


def check_folded(weights: FoldedWeights, case: Case) -> None:
    """Refuse a folded bottleneck's weights that do not fit each other, or the maps.

    Raises:
        ValueError: one sentence that names the weight and what it must be.
    """
    heads, expanded = case.value_BHNd.shape[1], len(weights.expand_EH)
    _require("expand", weights.expand_EH, (expanded, heads), f"for {heads} heads")
    _require("reduce", weights.reduce_HE, (heads, expanded), f"for {heads} heads and {expanded} expanded maps")
    _check_local(weights.local, expanded, case)
    for name, maps in (("bias1_E", expanded), ("bias2_E", expanded), ("gain_H", heads), ("shift_H", heads)):
        _require(name[:-2], getattr(weights, name), (maps,), f"for {maps} maps")


def _check_mask(mask_BN: Tensor, case: Case) -> None:
    batch, _, tokens, _ = case.value_BHNd.shape
    _require("mask", mask_BN, (batch, tokens), "beside these values")
    if mask_BN.dtype != torch.bool:
        raise ValueError(f"mask is {str(mask_BN.dtype).removeprefix('torch.')}; it must be bool, True for real tokens")
    if mask_BN.device != case.value_BHNd.device:
        raise ValueError(
            f"mask is on {mask_BN.device}, but value on {case.value_BHNd.device}; both must be on one device"
        )


def _check_local(local: LocalKernels, expanded: int, case: Case) -> None:
    side = max((size for kernel in local.kernels for size in kernel.shape[-2:]), default=0)
    shapes = kernel_shapes(local.constraint, side)
    if len(local.kernels) != len(shapes):
        raise ValueError(f"constraint {local.constraint!r} has {len(shapes)} kernels, not {len(local.kernels)}")
    for (name, shape), kernel in zip(shapes.items(), local.kernels, strict=True):
        _require(f"kernel {name!r}", kernel, (expanded, 1, *shape), f"for {expanded} expanded maps")
    rows, columns = local.grid
    if local.constraint != "none" and case.mask_BN is not None:
        raise ValueError(f"constraint is {local.constraint!r}; padded sequences have no patch grid, so it must be none")
    if local.constraint != "none" and not (rows > 0 and columns > 0 and rows * columns <= case.value_BHNd.shape[2]):
        raise ValueError(f"grid is {rows}x{columns}; its cells must be some of the {case.value_BHNd.shape[2]} tokens")


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}; {why} it must be {list(shape)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _row(value_BHNd: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in value_BHNd.shape[:3])
