"""Batches of one rank, from any position on, whatever the number of ranks and workers.

    step s of an epoch    positions [s·G, (s+1)·G) of the epoch's order          G global batch
    rank r of W           the slice [r·G/W, (r+1)·G/W) of those, cut into micro-batches in order

Workers are handed micro-batch numbers and make whole batches, so neither their number nor their speed shows in what
comes out. A position is the number of samples consumed, padding included: steps taken × global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refiner_ds.data.augment import (
    AugmentSettings,
    EvalSettings,
    TrainView,
    eval_view,
    seed_sample,
    undisturbed_randomness,
)
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.order import samples_at
from refiner_ds.data.samples import SampleReader, decode_image
from refiner_ds.errors import DataError

BAD_SAMPLE_CHOICES = ("error", "skip")


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images_BHWC: [B, S, S, 3] uint8 pixels, contiguous.
        labels_B: [B] int64.
        sample_B: [B] int64, number of each sample in the set.
        valid_B: [B] bool. False where evaluation pads, and where a damaged sample was skipped: such a place holds a
            copy of another sample of the batch, label included, so that training can go on without a special case.
        padded: samples at the end of this epoch's last batch that are repeated from its beginning (training), or
            places that hold nothing (evaluation).
        bad: damaged samples that were skipped.
    """

    images_BHWC: Tensor
    labels_B: Tensor
    sample_B: Tensor
    valid_B: Tensor
    padded: int = 0
    bad: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            images_BHWC=self.images_BHWC.to(device, non_blocking=non_blocking),
            labels_B=self.labels_B.to(device, non_blocking=non_blocking),
            sample_B=self.sample_B.to(device, non_blocking=non_blocking),
            valid_B=self.valid_B.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the loader asks for it where there is a GPU."""
        return replace(
            self,
            images_BHWC=self.images_BHWC.pin_memory(),
            labels_B=self.labels_B.pin_memory(),
            sample_B=self.sample_B.pin_memory(),
            valid_B=self.valid_B.pin_memory(),
        )


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


class _Batches(Dataset):
    """Makes micro-batches by number; what the DataLoader's workers hold."""

    def __init__(
        self, index: ShardIndex, plan: TrainPlan | EvalPlan, settings: AugmentSettings | EvalSettings, on_bad: str
    ) -> None:
        self.reader = SampleReader(index)
        self.plan = plan
        self.settings = settings
        self.train_view = TrainView(settings) if isinstance(settings, AugmentSettings) else None
        self.on_bad = on_bad

    def __getitem__(self, number: int) -> Batch | DataError:
        """A batch, or the error that stands in its way: raised in a worker it would arrive as a traceback."""
        try:
            with undisturbed_randomness():
                return self._make(self.plan.wanted(number))
        except DataError as error:
            return error

    def _make(self, wanted: Wanted) -> Batch:
        size, side = len(wanted.samples_B), self.settings.img_size
        images_BHWC = torch.empty((size, side, side, 3), dtype=torch.uint8)
        pixels_BHWC = images_BHWC.numpy()
        labels_B = np.zeros(size, np.int64)
        made_B = np.zeros(size, bool)
        bad = 0
        for place in np.flatnonzero(wanted.valid_B):
            try:
                pixels_BHWC[place], labels_B[place] = self._sample(int(wanted.samples_B[place]), wanted.epoch)
                made_B[place] = True
            except DataError:
                if self.on_bad == "error":
                    raise
                bad += 1
        self._fill(pixels_BHWC, labels_B, made_B, bad)
        return Batch(
            images_BHWC,
            torch.from_numpy(labels_B),
            torch.from_numpy(wanted.samples_B.astype(np.int64)),
            torch.from_numpy(made_B),
            wanted.padded,
            bad,
        )

    def _sample(self, sample: int, epoch: int) -> tuple[np.ndarray, int]:
        raw = self.reader.read(sample)
        image = decode_image(raw)
        if self.train_view is None:
            return eval_view(image, self.settings), raw.label  # type: ignore[arg-type]
        seed_sample(self.plan.seed, epoch, sample)  # type: ignore[union-attr]
        return self.train_view(image).pixels_SS3, raw.label

    def _fill(self, pixels_BHWC: np.ndarray, labels_B: np.ndarray, made_B: np.ndarray, bad: int) -> None:
        """Let places without a sample of their own repeat the one before them that has."""
        good = np.flatnonzero(made_B)
        if not len(good):
            if bad and self.train_view is not None:
                raise DataError(f"{self.reader.index.folder}: all {bad} samples of a micro-batch are damaged")
            pixels_BHWC[:] = 0
            return
        for place in np.flatnonzero(~made_B):
            source = good[max(0, int(np.searchsorted(good, place)) - 1)]
            pixels_BHWC[place], labels_B[place] = pixels_BHWC[source], labels_B[source]


@dataclass(frozen=True)
class Batches:
    """An iterable over one rank's batches; every iteration begins at the same place again.

    Attributes:
        plan: the arithmetic behind it.
        first: number of the first micro-batch.
    """

    dataset: Dataset
    plan: TrainPlan | EvalPlan
    first: int
    workers: int

    def _numbers(self) -> Iterable[int]:
        if isinstance(self.plan, EvalPlan):
            return range(self.plan.batches)
        return range(self.first, 1 << 62)

    def __iter__(self) -> Iterator[Batch]:
        batches = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._numbers(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: the loader would draw its workers' seed from the global one
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)  # workers are the parallelism; threads inside them only fight over cores


def train_batches(
    index: ShardIndex,
    augment: AugmentSettings,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    position: int = 0,
    workers: int = 0,
    on_bad_sample: str = "error",
) -> Batches:
    """Training batches of one rank, endless over epochs.

    Args:
        index: the training set.
        augment: how views are drawn.
        global_batch, micro_batch: samples a step over all ranks, and samples a `Batch`.
        rank, world_size: of this process.
        seed: of the run: the order of every epoch and the views of every sample follow from it.
        position: samples consumed so far, padding included: steps taken × global_batch.
        workers: loader processes; 0 makes batches in the caller.
        on_bad_sample: "error" raises when a damaged sample is met, "skip" fills its place and counts it.
    Raises:
        DataError: the batch does not divide, the position is not at a step, or (while iterating) a sample is damaged.
    """
    if position % global_batch:
        raise DataError(f"position {position} is not at a step of a global batch of {global_batch}")
    plan = TrainPlan(index.count, global_batch, micro_batch, rank, world_size, seed)
    first = position // global_batch * plan.micro_batches_per_step
    return Batches(_Batches(index, plan, augment, on_bad_sample), plan, first, workers)


def eval_batches(
    index: ShardIndex,
    settings: EvalSettings,
    *,
    batch: int,
    rank: int,
    world_size: int,
    workers: int = 0,
    on_bad_sample: str = "error",
) -> Batches:
    """Evaluation batches of one rank: every sample once over all ranks, equally many batches on each.

    Args:
        index: the validation set.
        settings: how images are looked at.
        batch: samples a `Batch`; places without a sample are marked invalid.
        rank, world_size, workers, on_bad_sample: as in `train_batches`.
    Raises:
        DataError: (while iterating) a sample is damaged.
    """
    plan = EvalPlan(index.count, batch, rank, world_size)
    return Batches(_Batches(index, plan, settings, on_bad_sample), plan, 0, workers)
