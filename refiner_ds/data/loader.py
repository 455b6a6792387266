"""Batches of one rank, from any position on, whatever the number of ranks and workers.

    step s of an epoch    positions [s·G, (s+1)·G) of the epoch's permutation    G global batch
    rank r of W           the slice [r·G/W, (r+1)·G/W) of those, cut into micro-batches in order

Workers get micro-batch numbers and load whole batches, so the result depends neither on their number nor on their
speed. A position is the number of samples consumed, padding included: steps taken × global batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.augment import AugmentSettings, EvalSettings, EvalViews
from refiner_ds.data.batch import Batch, MapBatch
from refiner_ds.data.dataset import BatchDataset
from refiner_ds.data.decoding import AS_STORED
from refiner_ds.data.hand_over import HandOver, UnderWay
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.sampler import EvalSampler, TrainSampler
from refiner_ds.data.shared_memory import PackedBatch, PackingDataset, SharedBuffers, packed_size
from refiner_ds.data.workers import WorkerWatch, explain_worker_death
from refiner_ds.errors import DataError

__all__ = ["Batch", "Batches", "MapBatch", "eval_batches", "train_batches"]

PREFETCH_FACTOR = 2  # batches a worker may be ahead


@dataclass(frozen=True)
class Batches:
    """An iterable over one rank's batches, each in memory of its own; every iteration begins at the same place again.

    Attributes:
        sampler: the arithmetic behind it.
        first: number of the first micro-batch.
    """

    dataset: BatchDataset
    sampler: TrainSampler | EvalSampler
    first: int
    workers: int

    def _numbers(self) -> Iterable[int]:
        if isinstance(self.sampler, EvalSampler):
            return range(len(self.sampler))
        return range(self.first, 1 << 62)

    def __iter__(self) -> Generator[Batch, None, None]:
        return self._run(None)

    def handed_over(self, device: torch.device) -> Generator[Batch, None, None]:
        """The same batches on a device, for a loop that uses one at a time (`HandOver`)."""
        return self._run(HandOver(device))

    def _run(self, hand_over: HandOver | None) -> Generator[Batch, None, None]:
        buffers, under_way = None, deque[UnderWay]()
        if self.workers:  # the most that can be in flight, and one that is being copied
            buffers = SharedBuffers(self.workers * PREFETCH_FACTOR + 1, packed_size(self.dataset.template()))
        batches = DataLoader(
            PackingDataset(self.dataset, buffers.memory_Sn) if buffers else self.dataset,
            batch_size=None,
            sampler=buffers.assign(self._numbers()) if buffers else self._numbers(),
            num_workers=self.workers,
            prefetch_factor=PREFETCH_FACTOR if buffers else None,
            collate_fn=_unchanged,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # of its own: the loader would draw its workers' seed from the global one
        )
        with explain_worker_death():
            with _term_blocked():  # which workers inherit: a TERM may come before they have begun
                running = iter(batches)
            watch = WorkerWatch(getattr(running, "_workers", []))
            for batch in running:
                watch.look()
                if isinstance(batch, DataError):
                    raise batch
                if hand_over is None:
                    yield batch.unpack(buffers.take(batch)) if buffers else batch
                    continue
                under_way.append(hand_over.begin(*_packed(batch, buffers, hand_over)))
                if len(under_way) > hand_over.ahead:
                    yield hand_over.finish(under_way.popleft())
            while hand_over is not None and under_way:
                yield hand_over.finish(under_way.popleft())


def _packed(
    batch: Batch | PackedBatch, buffers: SharedBuffers | None, hand_over: HandOver
) -> tuple[PackedBatch, torch.Tensor]:
    """A batch and its bytes, in host memory of ``hand_over``; what came through shared memory is copied out of it."""
    if isinstance(batch, Batch):
        bytes_n = hand_over.room(packed_size(batch))
        return PackedBatch.pack(batch, memory_n=bytes_n), bytes_n
    assert buffers is not None
    return batch, buffers.take(batch, hand_over.room)


@contextmanager
def _term_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)  # workers are the parallelism; threads inside them only fight over cores
    # Launchers tell whole process groups to stop. Torch lets a worker die of that, and training with it, although the
    # training process wants to finish its step and save: a worker ends when that process says so, or is gone.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a forked worker's is already
    threading.Thread(target=_exit_when_parent_asks, daemon=True).start()


def _exit_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
    maps: ShardIndex | None = None,
    decode: DecodeKeys = AS_STORED,
    repeats: int = 1,
) -> Batches:
    """Training batches of one rank, endless over epochs.

    Args:
        index: the training set.
        augment: how views are drawn.
        global_batch, micro_batch: samples a step over all ranks, and samples a `Batch`.
        rank, world_size: of this process.
        seed: of the run: the order of every epoch and the views of every sample follow from it.
        position: samples consumed so far, padding included: steps taken × global_batch.
        workers: loader processes; 0 loads batches in the caller.
        on_bad_sample: "error" raises when a damaged sample is met, "skip" fills its place and counts it.
        maps: where score maps come from: ``index`` itself, or the set that `find_maps` returns; None: no maps.
        decode: the run file's keys about decoding.
        repeats: views of a sample that are drawn together (repeated augmentation).
    Raises:
        ConfigError: the batch does not divide.
        DataError: the position is not at a step, the maps are not those of the set, or
            (while iterating) a sample is damaged.
    """
    if position % global_batch:
        raise DataError(f"position {position} is not at a step of a global batch of {global_batch}")
    sampler = TrainSampler(index.count, global_batch, micro_batch, rank, world_size, seed, repeats)
    first = position // global_batch * sampler.micro_batches_per_step
    return Batches(BatchDataset(index, sampler, augment, on_bad_sample, maps, decode), sampler, first, workers)


def eval_batches(
    index: ShardIndex,
    settings: EvalSettings | EvalViews,
    *,
    batch: int,
    rank: int,
    world_size: int,
    workers: int = 0,
    on_bad_sample: str = "error",
    decode: DecodeKeys = AS_STORED,
    samples: np.ndarray | None = None,
) -> Batches:
    """Evaluation batches of one rank: every sample once over all ranks, equally many batches on each.

    Args:
        index: the validation set.
        settings: how images are resized and cropped; several views lie one below the other in a `Batch`'s images.
        batch: samples a `Batch`; places without a sample are marked invalid.
        rank, world_size, workers, on_bad_sample, decode: as in `train_batches`.
        samples: numbers of the samples to take; None: all.
    Raises:
        DataError: (while iterating) a sample is damaged.
    """
    sampler = EvalSampler(index.count if samples is None else len(samples), batch, rank, world_size, samples)
    return Batches(BatchDataset(index, sampler, settings, on_bad_sample, decode=decode), sampler, 0, workers)
