"""Batch norm with fp32 statistics whatever the weights are, counted once however often a step is recomputed.

half-precision map or picture ──> BatchNorm ──> same precision
                                    └─ running_mean, running_var: fp32, one update a training step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BatchNorm",
    "Norm",
    "batch_norm",
    "counted",
    "fold_norm",
    "frozen_statistics",
    "masked_batch_norm",
    "recompute_aware",
    "statistics_dtype",
    "update_running",
]

# A plain global, not a thread-local: autograd recomputes in its own thread while the main one waits in backward,
# and torch.compile can guard on a global.
_frozen_depth = 0


class Norm(NamedTuple):
    """A batch norm over C maps as tensors; the running statistics are updated in place.

    Args:
        weight, bias: gain and shift, [C], any floating dtype.
        running_mean, running_var: averages over training, [C], fp32 or fp64.
        batches: how many batches the averages have seen, int64 scalar; ``None`` where nobody counts.
        training: use the batch's own statistics, and update the averages.
        eps, momentum: as in ``torch.nn.BatchNorm2d``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor | None
    training: bool
    eps: float = 1e-5
    momentum: float = 0.1

    @property
    def updates(self) -> bool:
        """Whether this pass should count in the running statistics: training, and not a recomputation."""
        return self.training and _frozen_depth == 0


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Inside, training passes use batch statistics as ever but leave the running ones alone."""
    global _frozen_depth
    _frozen_depth += 1
    try:
        yield
    finally:
        _frozen_depth -= 1


@contextmanager
def counted() -> Iterator[None]:
    """Inside, every training pass counts, in a recomputation too: for whoever hands in copies of the statistics."""
    global _frozen_depth
    before, _frozen_depth = _frozen_depth, 0
    try:
        yield
    finally:
        _frozen_depth = before


def recompute_aware(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` for one checkpointed call: from its second run on, running statistics stay as they are.

    Make a new wrapper for every call of ``checkpoint``; it then does not matter whose checkpoint it is. A compiled
    recomputation has no side effects, and needs none.
    """
    if torch.compiler.is_compiling():
        return function
    ran = False

    def run(*args: Any) -> Any:
        nonlocal ran
        if not ran:
            ran = True
            return function(*args)
        with frozen_statistics():
            return function(*args)

    return run


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision for softmax and statistics of tensors of ``dtype``: fp32 for halves, otherwise their own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def batch_norm(x: Tensor, norm: Norm) -> Tensor:
    """Normalise each map of ``x`` over every other axis (Ioffe and Szegedy, 2015), statistics in fp32 or better.

    Args:
        x: [B, C, ...], any floating dtype.
        norm: gains, running statistics and mode; see :class:`Norm`.
    Returns:
        The shape and dtype of ``x``.
    """
    precision = statistics_dtype(x.dtype)
    counts = norm.updates and x.numel() > 0  # an empty batch has no statistics
    if counts and norm.batches is not None:
        norm.batches.add_(1)
    averages = (norm.running_mean, norm.running_var)
    if norm.training and not counts:
        # Copies rather than None: torch's checkpoint requires a recomputation to save as many tensors as the first run.
        averages = (norm.running_mean.clone(), norm.running_var.clone())
    # The kernels take half-precision input beside fp32 gains and averages, and then accumulate in fp32.
    return F.batch_norm(
        x, *averages, norm.weight.to(precision), norm.bias.to(precision), norm.training, norm.momentum, norm.eps
    )


def masked_batch_norm(x_BCNN: Tensor, norm: Norm, outside_B1NN: Tensor, count: Tensor) -> Tensor:
    """As :func:`batch_norm` for maps of padded sequences: the batch's statistics are those of its real entries.

    Args:
        x_BCNN: maps; what is outside takes no part in a statistic, and comes out as any number.
        norm: gains, running statistics and mode.
        outside_B1NN: the entries that are not real.
        count: how many of one map are, float64.
    """
    if not norm.training:
        return batch_norm(x_BCNN, norm)
    precision = statistics_dtype(x_BCNN.dtype)
    exact_BCNN, share = x_BCNN.to(precision), count.reciprocal().to(precision)
    mean_C = exact_BCNN.masked_fill(outside_B1NN, 0.0).sum((0, 2, 3)) * share
    centred_BCNN = (exact_BCNN - mean_C[:, None, None]).masked_fill(outside_B1NN, 0.0)
    variance_C = centred_BCNN.square().sum((0, 2, 3)) * share
    update_running(norm, mean_C, variance_C, count)
    gain_C = norm.weight.to(precision) * (variance_C + norm.eps).rsqrt()
    return (centred_BCNN * gain_C[:, None, None] + norm.bias.to(precision)[:, None, None]).to(x_BCNN.dtype)


def fold_norm(norm: Norm, mean_C: Tensor, variance_C: Tensor) -> tuple[Tensor, Tensor]:
    """A batch norm with given statistics as gain and inverse deviation, float64, [C] and [C]."""
    inverse_C = (variance_C.double() + norm.eps).rsqrt()
    return norm.weight.double() * inverse_C, inverse_C


@torch.no_grad()
def update_running(norm: Norm, mean_C: Tensor, variance_C: Tensor, count: int | Tensor) -> None:
    """Count one training pass over ``count`` entries a map, as ``torch.nn.BatchNorm2d`` does; not in recomputation."""
    if not norm.updates:
        return
    if norm.batches is not None:
        norm.batches.add_(1)
    others = (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1
    unbiased_C = variance_C * (count / others)
    for running_C, new_C in ((norm.running_mean, mean_C), (norm.running_var, unbiased_C)):
        running_C.copy_(running_C.double().lerp(new_C.to(running_C.device, torch.float64), norm.momentum))


class BatchNorm(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for half-precision weights, autocast, ZeRO and activation checkpointing.

    The running statistics stay in fp32 when the module is cast to a half precision, and a pass inside
    :func:`frozen_statistics` does not count in them.
    """

    # DeepSpeed reads this: zero.Init otherwise makes every tensor created under it half precision, buffers too.
    _keep_in_fp32_modules_strict = ("running_mean", "running_var")

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        for name in ("running_mean", "running_var"):
            made = self._buffers[name]
            self._buffers[name] = None if made is None else made.to(statistics_dtype(made.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape and dtype."""
        if self.running_mean is None or self.running_var is None:
            precision = statistics_dtype(x.dtype)
            weight, bias = (None if one is None else one.to(precision) for one in (self.weight, self.bias))
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return batch_norm(x, self.as_norm(x.device))

    def as_norm(self, device: torch.device | None = None) -> Norm:
        """The norm as the functional operators take it, in the mode the module is in.

        As in ``torch.nn.BatchNorm2d`` people may take away its gain, shift or running statistics, stop counting
        (``track_running_stats``), or average cumulatively (``momentum`` ``None``, as ``swa_utils.update_bn`` sets it).

        Args:
            device: where to make what it does not have; ``None`` is where the others are.
        """
        there = next((one for one in (self.weight, self.bias, self.running_mean) if one is not None), None)
        device = device or (None if there is None else there.device)

        def all_of(value: float) -> Tensor:
            return torch.full((self.num_features,), value, device=device)

        mean, variance = self.running_mean, self.running_var
        training, batches = self.training or mean is None or variance is None, self.num_batches_tracked
        if mean is None or variance is None or (training and not self.track_running_stats):
            mean, variance, batches = all_of(0.0), all_of(1.0), None  # read by nobody
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(batches) + 1) if training and batches is not None else 0.0
        weight, bias = self.weight, self.bias
        return Norm(
            all_of(1.0) if weight is None else weight,
            all_of(0.0) if bias is None else bias,
            mean, variance, batches, training, self.eps, momentum,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        precise = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, before in precise.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype in (torch.bfloat16, torch.float16):
                # Casting back would keep the rounding; move the untouched numbers instead.
                self._buffers[name] = before.to(after.device, statistics_dtype(before.dtype))
        return self
