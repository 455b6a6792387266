"""Which part of the network the gradient is in: its norm by part, in the steps that are logged.

    stem   embeddings   block_00 …   refiner_01 …   heads          their squares add up to the square of grad_norm

Read from the fp32 gradients beside the master weights, when all is done but the update: that place is the same at every
ZeRO stage and in both precisions, and each rank looks at the part it owns. Nothing here waits for the device.
"""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor

from refiner_ds.training.engine import Engine
from refiner_ds.training.reading import scalar_on
from refiner_ds.training.world import World

log = logging.getLogger("refiner_ds")

BLOCK = re.compile(r"blocks\.(\d+)\.(attn\.(?:DLA|adapt_bn|refiner)\.)?")


def part_of(name: str) -> str:
    """The part of the network a parameter belongs to."""
    if (found := BLOCK.match(name)) is not None:
        return f"{'refiner' if found[2] else 'block'}_{int(found[1]):02d}"
    if name.startswith("patch_embed."):
        return "stem"
    return "embeddings" if name in ("cls_token", "pos_embed") else "heads"  # the last norm is part of the heads


class GradientNorms:
    """Norms by part of the steps it is told to watch. Every rank has one and watches the same steps.

    Attributes:
        parts: in the order of the norms.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine, self._world = engine, world
        # Found now: in the middle of an update DeepSpeed shows the optimizer one parameter group.
        self._masters, self._fragments = engine.master_parameters(), engine.fragments
        names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
        self.parts = sorted({part_of(name) for name in names})
        self._squares = torch.zeros(len(self.parts), device=world.device)
        self._seen: set[int] = set()
        self._told = False
        self._places: dict[int, Tensor] = {}

    def watch(self) -> None:
        """The update that comes next is looked at."""
        self._squares.zero_()
        self._seen.clear()
        self._engine.before_update = self._look

    @torch.no_grad()
    def _look(self) -> None:
        # DeepSpeed updates a parameter group at a time, each with its gradients at hand only then.
        for number, master in enumerate(self._masters):
            if number in self._seen or master.grad is None:
                continue
            self._seen.add(number)
            grads = {number: master.grad}
            mine = [fragment for fragment in self._fragments if fragment.master == number]
            if not mine:
                continue  # padding
            norms_F = torch.stack(torch._foreach_norm([fragment.of(grads).float() for fragment in mine]))
            if number not in self._places:  # copied once, since that waits for the device
                places = [self.parts.index(part_of(fragment.name)) for fragment in mine]
                self._places[number] = torch.tensor(places, device=self._world.device)
            squares_F = norms_F.to(self._world.device, non_blocking=True).square()
            self._squares.index_add_(0, self._places[number], squares_F)

    def finish(self) -> Tensor | None:
        """Norms by part before clipping, on the device, once the watched step is done; None where it did not update."""
        self._engine.before_update = None
        norm = self._engine.unread_grad_norm
        if not self._engine.stepped or norm is None:
            return None
        if len(self._seen) < len(self._masters):
            if not self._told:
                log.info("gradient norms by part are left out: DeepSpeed shows no gradients where it updates weights")
                self._told = True
            return None
        if not self._engine.replicated:
            self._world.all_reduce_sum(self._squares)
        # What is seen is clipped already, all of it by one factor: shares of the whole are not.
        shares = self._squares / self._squares.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return scalar_on(shares.device, norm).float() * shares.sqrt()
