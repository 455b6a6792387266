"""Norms with running statistics folded into their neighbours, computed in float64.

    expand ─ norm ─ local ─ norm ─ project ─ norm ─ + A ─ norm, · scale ──> FoldedWeights

Axes: H heads, E expanded maps.
"""

from __future__ import annotations

from torch import Tensor

from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import BottleneckWeights, FoldedWeights

__all__ = ["fold_refiner", "running_affine", "scaled"]


def fold_refiner(refiner: BottleneckWeights, scale: float) -> FoldedWeights:
    """The bottleneck with running statistics as weights and biases, ``scale`` included.

    The second norm's gain goes into the local kernel if every entry of a map passes through it; under a constraint
    the class tokens' entries do not.
    """
    dtype = refiner.expand_EH.dtype
    gain1_E, shift1_E = running_affine(refiner.norm1_E)
    gain2_E, shift2_E = running_affine(refiner.norm2_E)
    gain3_H, shift3_H = running_affine(refiner.norm3_H)
    gain4_H, shift4_H = (scale * x for x in running_affine(refiner.adapt_H))
    local, gain2 = refiner.local, None if refiner.local.constraint == "none" else gain2_E.to(dtype)
    if gain2 is None:
        local = local._replace(kernels=(scaled(local.kernels[0], gain2_E).to(dtype),))
    return FoldedWeights(
        scaled(refiner.expand_EH, gain1_E).to(dtype),
        shift1_E.to(dtype),
        local,
        gain2,
        shift2_E.to(dtype),
        scaled(refiner.reduce_HE, gain4_H * gain3_H).to(dtype),
        gain4_H.to(dtype),
        (gain4_H * shift3_H + shift4_H).to(dtype),
    )


def running_affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm with running statistics as x·gain + shift, float64."""
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()


def scaled(weight: Tensor, gain: Tensor) -> Tensor:
    """A weight's outputs each times its gain, float64."""
    return weight.double() * gain.reshape(-1, *[1] * (weight.dim() - 1))
