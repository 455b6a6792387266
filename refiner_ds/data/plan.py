"""The arithmetic of positions: which samples each micro-batch of each rank holds. Pure functions of a few numbers.

step s of an epoch    positions [s·G, (s+1)·G) of the epoch's order          G global batch
rank r of W           the slice [r·G/W, (r+1)·G/W) of those, cut into micro-batches in order
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refiner_ds.data.order import samples_at
from refiner_ds.errors import DataError


@dataclass(frozen=True)
class Wanted:
    """A micro-batch to make: sample numbers, which of them count, how many are padding, and the epoch they are in."""

    samples_B: np.ndarray
    valid_B: np.ndarray
    padded: int
    epoch: int


@dataclass(frozen=True)
class TrainPlan:
    """The arithmetic of positions: which samples a micro-batch holds.

    Raises:
        DataError: the set is empty, or the batch does not divide over ranks and micro-batches.
    """

    count: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.count:
            raise DataError("the training set holds no samples")
        if self.global_batch % (self.micro_batch * self.world_size):
            raise DataError(
                f"a global batch of {self.global_batch} does not divide into micro-batches of {self.micro_batch} "
                f"on {self.world_size} ranks"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; the last one may be padded."""
        return -(-self.count // self.global_batch)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of this rank a step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def wanted(self, number: int) -> Wanted:
        """The ``number``-th micro-batch of this rank, counted from the beginning of the run."""
        step, micro = divmod(number, self.micro_batches_per_step)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.global_batch + (self.rank * self.micro_batches_per_step + micro) * self.micro_batch
        positions = np.arange(start, start + self.micro_batch)
        padded = int((positions >= self.count).sum())
        samples = samples_at(positions % self.count, count=self.count, seed=self.seed, epoch=epoch)
        return Wanted(samples, np.ones(self.micro_batch, bool), padded, epoch)


@dataclass(frozen=True)
class EvalPlan:
    """Which samples a rank evaluates: a contiguous share, in batches of one size and equal number on every rank."""

    count: int
    batch: int
    rank: int
    world_size: int

    @property
    def batches(self) -> int:
        """Batches of every rank."""
        return -(-self.share // self.batch)

    @property
    def share(self) -> int:
        """Samples of a rank, before padding."""
        return -(-self.count // self.world_size)

    def wanted(self, number: int) -> Wanted:
        """The ``number``-th batch of this rank."""
        within = np.arange(number * self.batch, (number + 1) * self.batch)
        samples = self.rank * self.share + within
        valid = (within < self.share) & (samples < self.count)
        return Wanted(np.where(valid, samples, 0), valid, int((~valid).sum()), 0)
