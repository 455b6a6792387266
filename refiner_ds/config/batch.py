"""Batch arithmetic: the global batch is the recipe, accumulation follows from the number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refiner_ds.errors import ConfigError


@dataclass(frozen=True)
class BatchSplit:
    """How one optimizer step's images are shared out: global = world × micro × accumulation."""

    world_size: int
    global_batch: int
    micro_batch: int
    accumulation: int

    def steps(self, images: int) -> int:
        """Optimizer steps of an epoch of so many images (the last batch is padded)."""
        return math.ceil(images / self.global_batch)

    def __str__(self) -> str:
        return (
            f"{self.global_batch} images a step = {_counted(self.world_size)} × {self.micro_batch} at once"
            f" × {self.accumulation} accumulated"
        )


def split_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchSplit:
    """Share ``global_batch`` images over ``world_size`` processes.

    Args:
        micro_batch: images a process computes at once; None: its whole share.
    Raises:
        ConfigError: it does not divide; the sentence names the nearest global batches, numbers of processes and
            micro-batches that do.
    """
    unit = world_size * (micro_batch or 1)
    if global_batch % unit == 0:
        micro = micro_batch or global_batch // world_size
        return BatchSplit(world_size, global_batch, micro, global_batch // (world_size * micro))
    below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
    nearest = f"the nearest that do are {below} and {above}" if below else f"the nearest that does is {above}"
    each = f" × {micro_batch} images at once" if micro_batch else ""
    sentence = f"train_batch_size {global_batch} does not divide over {_counted(world_size)}{each}; {nearest}"
    if worlds := _nearest_worlds(global_batch, micro_batch or 1, world_size):
        sentence += f", or start {' or '.join(map(str, worlds))} processes"
    if micro_batch and global_batch % world_size == 0:
        share = global_batch // world_size
        fits = min((d for d in range(1, share + 1) if share % d == 0), key=lambda d: (abs(d - micro_batch), -d))
        sentence += f", or set train_micro_batch_size_per_gpu to {fits}"
    raise ConfigError(sentence)


def _nearest_worlds(global_batch: int, micro_batch: int, world_size: int) -> list[int]:
    """The numbers of processes on either side of ``world_size`` over which the batch divides."""
    fits = [world for world in range(1, global_batch + 1) if global_batch % (world * micro_batch) == 0]
    return [world for world in fits if world < world_size][-1:] + [world for world in fits if world > world_size][:1]


def _counted(processes: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}"
