"""Which samples each micro-batch of each rank holds: pure functions of a few numbers.

step s of an epoch    positions [s·G, (s+1)·G) of the epoch's permutation    G global batch
rank r of W           the slice [r·G/W, (r+1)·G/W) of those, cut into micro-batches in order
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refiner_ds.config.batch import split_batch
from refiner_ds.data.permutation import samples_at
from refiner_ds.errors import DataError


@dataclass(frozen=True)
class BatchIndices:
    """The samples of one micro-batch.

    Attributes:
        samples_B: [B] int64 sample numbers.
        valid_B: [B] bool; False where a place holds no sample.
        padded: how many places repeat the epoch's beginning (training) or hold no sample (evaluation).
        epoch: counted from 0.
    """

    samples_B: np.ndarray
    valid_B: np.ndarray
    padded: int
    epoch: int


@dataclass(frozen=True)
class TrainSampler:
    """The micro-batches of one rank in training, endless over epochs.

    Raises:
        DataError: the set is empty.
        ConfigError: the batch does not divide over ranks and micro-batches.
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
        split_batch(self.global_batch, self.micro_batch, self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; the last one may be padded."""
        return split_batch(self.global_batch, self.micro_batch, self.world_size).steps(self.count)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of this rank a step."""
        return split_batch(self.global_batch, self.micro_batch, self.world_size).accumulation

    def __getitem__(self, number: int) -> BatchIndices:
        """The ``number``-th micro-batch of this rank, counted from the beginning of the run."""
        step, micro = divmod(number, self.micro_batches_per_step)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.global_batch + (self.rank * self.micro_batches_per_step + micro) * self.micro_batch
        positions = np.arange(start, start + self.micro_batch)
        padded = int((positions >= self.count).sum())
        samples = samples_at(positions % self.count, count=self.count, seed=self.seed, epoch=epoch)
        return BatchIndices(samples, np.ones(self.micro_batch, bool), padded, epoch)


@dataclass(frozen=True)
class EvalSampler:
    """The batches of one rank in evaluation: a contiguous share of the set, equally many batches on every rank.

    Attributes:
        count: samples that are evaluated.
        chosen: [count] their numbers; None: 0, 1, 2, …
    """

    count: int
    batch: int
    rank: int
    world_size: int
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-self.samples_per_rank // self.batch)

    @property
    def samples_per_rank(self) -> int:
        """Samples of a rank, before padding."""
        return -(-self.count // self.world_size)

    def __getitem__(self, number: int) -> BatchIndices:
        """The ``number``-th batch of this rank."""
        within = np.arange(number * self.batch, (number + 1) * self.batch)
        samples = self.rank * self.samples_per_rank + within
        valid = (within < self.samples_per_rank) & (samples < self.count)
        samples = np.where(valid, samples, 0)
        if self.chosen is not None and self.count:
            samples = self.chosen[samples]
        return BatchIndices(samples, valid, int((~valid).sum()), 0)
