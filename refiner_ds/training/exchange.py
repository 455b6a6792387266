"""The one collective at the end of every optimizer step.

Batch norms see each rank's own images, and DeepSpeed never synchronises buffers, so running statistics would drift
apart and only rank 0's would be saved. Here they become the mean over ranks after each step: what one process would
have gathered over the same images by accumulation. Losses and the wish to stop ride in the same few kilobytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.training.losses import Losses
from refiner_ds.training.world import World


class StepExchange:
    """ModelEma running statistics and losses over ranks, and tells every rank whether any of them was asked to stop.

    Args:
        buffers: live buffers by name; floating-point ones are averaged, in place.
    """

    def __init__(self, buffers: dict[str, Tensor], world: World) -> None:
        self._world = world
        self._buffers = [buffer for buffer in buffers.values() if buffer.is_floating_point()]
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._losses = torch.zeros(3, device=world.device)

    def add(self, losses: Losses, share: float) -> None:
        """Count a micro-batch's losses, ``share`` of the step's."""
        self._losses += torch.stack([part.detach() for part in losses]) * share

    @torch.no_grad()
    def finish(self, wants_to_stop: bool) -> Tensor:
        """End the step.

        Returns:
            [loss, class loss, patch loss, share of ranks that want to stop], means over ranks, on the device.
        """
        wish = torch.full((1,), float(wants_to_stop), device=self._world.device)
        packed = torch.cat([self._losses, wish, *(buffer.reshape(-1).float() for buffer in self._buffers)])
        self._losses.zero_()
        self._world.all_reduce_mean(packed)
        head, *parts = packed.split([4, *self._sizes])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
        return head
