"""Batch norm whose training statistics are those of the images of all ranks, on CPUs too.

    [B,C,h,w] on each rank ── sums ── all-reduce ── mean ── squares ── all-reduce ── variance ── normalize

Equal to one process with the whole batch, gradients and running statistics included. ``torch.nn.SyncBatchNorm`` runs on
GPUs only, stores halves in half precision and counts a recomputed step twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refiner_ds.attention import BatchNorm, Norm
from refiner_ds.attention.norms import statistics_dtype

__all__ = ["SyncBatchNorm", "several_ranks"]


def several_ranks() -> bool:
    """Whether there is anybody to synchronise with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class SyncBatchNorm(BatchNorm):
    """:class:`refiner_ds.attention.BatchNorm` over all ranks. Every rank must run it equally often, in one order."""

    @classmethod
    def convert(cls, model: nn.Module) -> nn.Module:
        """Synchronise every batch norm of this package in ``model``, in place; returns the model."""
        for module in model.modules():
            if type(module) is BatchNorm:
                module.__class__ = cls  # the same module: hooks and settings stay
        return model

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape and dtype."""
        if not self.training or not several_ranks():
            return super().forward(x)
        norm, axes, shape = self.as_norm(x.device), (0, 2, 3), (1, -1, 1, 1)
        exact = x.to(statistics_dtype(x.dtype))
        count = _sum_over_ranks(exact.new_tensor(x.numel() // x.shape[1]))
        mean_C = _sum_over_ranks(exact.sum(axes)) / count
        centred = exact - mean_C.view(shape)
        variance_C = _sum_over_ranks(centred.square().sum(axes)) / count
        if norm.updates:
            _update(norm, mean_C, variance_C, count)
        gain_C = (variance_C + norm.eps).rsqrt() * norm.weight
        return torch.addcmul(norm.bias.view(shape).to(exact.dtype), centred, gain_C.view(shape)).to(x.dtype)


@torch.no_grad()  # a recomputation, which does not come here, must save as many tensors as the first run
def _update(norm: Norm, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
    unbiased_C = variance_C * count / (count - 1).clamp(min=1)
    norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_(unbiased_C.to(norm.running_var.dtype), norm.momentum)
    if norm.batches is not None:
        norm.batches.add_(1)


def _sum_over_ranks(values: Tensor) -> Tensor:
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()  # every rank's loss depends on every rank's values
        dist.all_reduce(total)
        return total
