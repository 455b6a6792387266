"""Which samples each micro-batch of each rank holds: pure functions of a few numbers.

step s of an epoch    positions [s·G, (s+1)·G) of the epoch's permutation    G global batch
rank r of W           the slice [r·G/W, (r+1)·G/W) of those, cut into micro-batches in order

With repeated augmentation (Hoffer et al., 2020) each sample comes R times in a row, in R views, and one permutation
lasts for R epochs. A step takes the first of each, then the second, and so on, so that they lie far apart:

positions of a step   a a a b b b c c  ─▶  a b c  a b c  a b        R = 3, G = 8; the last c begins the next step
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
        views_B: [B] int64 numbers of the views that training draws: the epoch, where an epoch has one view of a sample.
    """

    samples_B: np.ndarray
    valid_B: np.ndarray
    padded: int
    views_B: np.ndarray


@dataclass(frozen=True)
class TrainSampler:
    """The micro-batches of one rank in training, endless over epochs.

    Attributes:
        repeats: R, views of a sample that are drawn together. An epoch still has ``count`` views, so that R epochs
            have R of each sample.
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
    repeats: int = 1

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
        first = (self.rank * self.micro_batches_per_step + micro) * self.micro_batch
        positions = step * self.global_batch + self._dealt(np.arange(first, first + self.micro_batch))
        padded = int((positions >= self.count).sum())
        order, part = divmod(epoch, self.repeats)
        drawn, copies = np.divmod(part * self.count + positions % self.count, self.repeats)
        samples = samples_at(drawn, count=self.count, seed=self.seed, epoch=order)
        return BatchIndices(samples, np.ones(self.micro_batch, bool), padded, epoch * self.repeats + copies)

    def _dealt(self, places: np.ndarray) -> np.ndarray:
        """Positions within a step at its places: those divisible by R in order, then those with remainder 1, …"""
        sizes = [len(range(copy, self.global_batch, self.repeats)) for copy in range(self.repeats)]
        starts = np.cumsum([0, *sizes[:-1]])
        copies = np.searchsorted(starts, places, side="right") - 1
        return (places - starts[copies]) * self.repeats + copies


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
        return BatchIndices(samples, valid, int((~valid).sum()), np.zeros(self.batch, np.int64))
