"""The one collective at the end of every optimizer step.

Batch norms see each rank's own images, and DeepSpeed never synchronises buffers, so running statistics would drift
apart and only rank 0's would be saved. Here they become the mean over ranks after each step: what one process would
have gathered over the same images by accumulation. Losses and requests to stop ride in the same few kilobytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.training.world import World


class StepExchange:
    """All-reduces running statistics and a few scalars to their means over ranks.

    Args:
        buffers: live buffers by name; floating-point ones are averaged, in place.
    """

    def __init__(self, buffers: dict[str, Tensor], world: World) -> None:
        self._world = world
        self._buffers = [buffer for buffer in buffers.values() if buffer.is_floating_point()]
        self._sizes = [buffer.numel() for buffer in self._buffers]

    @torch.no_grad()
    def mean(self, numbers_n: Tensor) -> Tensor:
        """End the step: average the statistics, and return the means of ``numbers_n``, fp32 on the device."""
        packed = torch.cat([numbers_n, *(buffer.reshape(-1).float() for buffer in self._buffers)])
        self._world.all_reduce_mean(packed)
        means_n, *parts = packed.split([len(numbers_n), *self._sizes])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
        return means_n
