"""The refiner of one layer as a module that transformers can initialise, save and shard.

    LinearRefiner        expand ─ kernel ─ reduce
    BottleneckRefiner    expand ─ norm1 ─ kernel ─ norm2 ─ reduce ─ norm3, and adapt behind the identity

It is called with queries, keys, values and a mask, so that hooks on it, DeepSpeed's for one, run where its weights are
used. They are parameters of its own, not convolutions', since transformers draws the weights of those anew.
Axes: B batch, H heads, E expanded maps, N tokens, d head width.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import initialization

from refiner_ds import attention
from refiner_ds.attention import (
    BatchNorm,
    BottleneckWeights,
    DeferredMap,
    LinearWeights,
    LocalKernels,
    RefinerWeights,
    expanded_maps,
    frozen_statistics,
)
from refiner_ds.text.options import RefinerOptions

__all__ = ["BottleneckRefiner", "LinearRefiner", "TextRefiner", "build_refiner"]


class TextRefiner(nn.Module):
    """The frame: the three weights, their initial values, and the call of the operator.

    Args:
        heads: of the attention it refines.
        options: ratio, kernel size and initial values.
    """

    def __init__(self, heads: int, options: RefinerOptions) -> None:
        super().__init__()
        maps, side = expanded_maps(heads, options.expansion_ratio), options.kernel_size
        self.options = options
        # Kept, since under ZeRO 3 a weight has no shape while it is not gathered.
        self.shapes = {"expand": (maps, heads), "kernel": (maps, 1, side, side), "reduce": (heads, maps)}
        self.expand, self.kernel, self.reduce = (nn.Parameter(torch.empty(shape)) for shape in self.shapes.values())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as ``torch.nn.Conv2d`` draws its own; for an identity, put one into the first H maps.

        There each head's map passes alone and unchanged and the further maps are reduced with zeros, so that they have
        gradients and take part from the second step on. A weight that has been loaded is left alone.
        """
        heads, weights = self.shapes["expand"][1], (self.expand, self.kernel, self.reduce)
        expand_EH, kernel_E1kk, reduce_HE = (
            torch.empty(shape, dtype=weight.dtype, device=weight.device)
            for weight, shape in zip(weights, self.shapes.values(), strict=True)
        )
        for weight in (expand_EH, kernel_E1kk, reduce_HE):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.options.init == "identity":
            eye, centre = torch.eye(heads), self.options.kernel_size // 2
            expand_EH[:heads] = eye.to(expand_EH)
            kernel_E1kk[:heads] = 0
            kernel_E1kk[:heads, :, centre, centre] = 1
            reduce_HE[:] = 0
            reduce_HE[:, :heads] = eye.to(reduce_HE)
        for weight, value in zip(weights, (expand_EH, kernel_E1kk, reduce_HE), strict=True):
            initialization.copy_(weight, value)

    def local(self) -> LocalKernels:
        """The kernels as the operator takes them."""
        return LocalKernels((self.kernel,), "none", (0, 0))

    def weights(self) -> RefinerWeights:
        """The refiner as ``attention.refine`` takes it."""
        raise NotImplementedError

    def scale(self, scale: float) -> float:
        """The factor on refined maps, where queries and keys are multiplied with ``scale``."""
        raise NotImplementedError

    def forward(
        self, q_BHNd: Tensor, k_BHNd: Tensor, value_BHNd: Tensor, mask_BN: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        """Refined attention, [B, H, N, d]; zero for padding.

        A call inside a backward pass is an activation checkpoint's: norms do not count it a second time.
        """
        deferred = DeferredMap(q_BHNd, k_BHNd, scale, dropout, mask_BN)
        with frozen_statistics() if _in_backward() else nullcontext():
            return attention.refine(deferred, value_BHNd, self.weights(), self.scale(scale))

    def refined_map(self, q_BHNd: Tensor, k_BHNd: Tensor, mask_BN: Tensor | None, scale: float) -> Tensor:
        """The maps that multiply the values, [B, H, N, N], without dropout; zero for padding."""
        made_BHNN = attention.make_map(DeferredMap(q_BHNd, k_BHNd, scale, 0.0, mask_BN)).to(q_BHNd.dtype)
        with frozen_statistics():
            refined_BHNN = attention.refined_map(made_BHNN, self.weights(), self.scale(scale), mask_BN)
        if mask_BN is None:
            return refined_BHNN
        return refined_BHNN * (mask_BN[:, None, :, None] & mask_BN[:, None, None, :])


class LinearRefiner(TextRefiner):
    """The paper's refiner (sections 3.2 and 3.3)."""

    def weights(self) -> LinearWeights:
        """Expansion, kernels, reduction."""
        return LinearWeights(self.expand, self.local(), self.reduce)

    def scale(self, scale: float) -> float:
        """1: maps are refined into maps."""
        return 1.0


class BottleneckRefiner(TextRefiner):
    """The released models' refiner; its maps are scaled once more, as theirs are."""

    def __init__(self, heads: int, options: RefinerOptions) -> None:
        super().__init__(heads, options)
        maps = self.shapes["expand"][0]
        self.norm1, self.norm2 = BatchNorm(maps), BatchNorm(maps)
        self.norm3, self.adapt = BatchNorm(heads), BatchNorm(heads)

    def weights(self) -> BottleneckWeights:
        """Weights and norms, in the mode the module is in."""
        norms = [norm.as_norm() for norm in (self.norm1, self.norm2, self.norm3, self.adapt)]
        return BottleneckWeights(self.expand, norms[0], self.local(), norms[1], self.reduce, norms[2], norms[3])

    def scale(self, scale: float) -> float:
        """That of the logits."""
        return scale


def build_refiner(heads: int, options: RefinerOptions) -> TextRefiner:
    """The refiner of one layer.

    Raises:
        ConfigError: expansion makes no whole number of maps of so many heads.
    """
    options.check_heads(heads)
    return (LinearRefiner if options.kind == "linear" else BottleneckRefiner)(heads, options)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
