"""EMA weights: w̄ ← d·w̄ + (1−d)·w after every optimizer step, in fp32, running statistics included.

With warm-up, d is at most (1+n)/(10+n) in step n. Without it, a batch norm's initial running variance of 1 drowns the
variance of attention probabilities, some 1e-6, for ln(1e6)/(1−d) steps: the better part of a run at d = 0.99996.

Each rank averages the part of the fp32 master weights it owns, so averaging costs no communication at any ZeRO stage
and no more memory than that part. The whole EMA is gathered, by DeepSpeed's own means, only to save or to evaluate:
it changes places with the masters, is read, and changes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from refiner_ds.training.engine import Engine


class ModelEma:
    """Exponential moving average of an engine's weights and buffers.

    Args:
        decay: d above, per optimizer step; 0 keeps the EMA equal to the weights.
        warmup: begin with a smaller d.
    """

    def __init__(self, engine: Engine, decay: float, warmup: bool) -> None:
        self._decay = decay
        self._warmup = warmup
        self._engine = engine
        self._weights = [master.clone() for master in engine.masters()]
        self._buffers = {name: buffer.clone() for name, buffer in engine.statistics().items()}

    def decay(self, step: int) -> float:
        """d of the ``step``-th optimizer step, counted from 0."""
        return min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after the ``step``-th optimizer step, counted from 0."""
        new = 1 - self.decay(step)
        torch._foreach_lerp_(self._weights, self._engine.masters(), new)
        for name, buffer in self._engine.statistics().items():
            if buffer.is_floating_point():
                self._buffers[name].lerp_(buffer, new)
            else:
                self._buffers[name].copy_(buffer)  # batch counters are counted, not averaged

    @contextmanager
    def _in_place_of_masters(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self._engine.await_copies is not None:
            self._engine.await_copies()
        for mine, master in zip(self._weights, self._engine.masters(), strict=True):
            held = master.clone()
            master.copy_(mine)
            mine.copy_(held)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """EMA weights and buffers, whole, on the CPU, under the model's names. Every rank must call it."""
        with self._in_place_of_masters():
            weights = self._engine.full_weights()
        return {**weights, **{name: buffer.cpu().clone() for name, buffer in self._buffers.items()}}

    @property
    def masters(self) -> list[Tensor]:
        """This rank's part of the EMA, in the form of the engine's masters, live."""
        return self._weights

    @property
    def buffers(self) -> dict[str, Tensor]:
        """EMA of the model's buffers by name, live."""
        return self._buffers
