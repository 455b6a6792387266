"""Batches: every sample once, in one order, whatever the ranks, the workers and the place where a run was stopped."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_ds.data import loader
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.batch import Batch, MapBatch
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.permutation import samples_at
from refiner_ds.data.shared_memory import NO_BUFFER, PackedBatch, PackingDataset, SharedBuffers, packed_size
from refiner_ds.errors import ConfigError, DataError
from tests.data.conftest import views
from tests.data.small_disk import SmallDisk, on_small_disk

PLAIN = views(8, crop_scale=(0.5, 1.0))


def global_batches(
    index: ShardIndex, steps: int, world: int, *, size: int = 24, micro: int = 3, start: int = 0, workers: int = 0
) -> list[tuple[list[int], torch.Tensor]]:
    """Sample numbers and pixels of whole steps, put together from all ranks."""
    per_step = size // (world * micro)
    ranks = [
        list(
            islice(
                train_batches(
                    index, PLAIN, global_batch=size, micro_batch=micro, rank=rank, world_size=world, seed=5,
                    position=start * size, workers=workers,
                ),
                steps * per_step,
            )
        )
        for rank in range(world)
    ]  # fmt: skip
    joined = []
    for step in range(steps):
        parts = [batch for batches in ranks for batch in batches[step * per_step : (step + 1) * per_step]]
        joined.append((torch.cat([p.sample_B for p in parts]).tolist(), torch.cat([p.images_BHWC for p in parts])))
    return joined


def same(one: list[tuple[list[int], torch.Tensor]], other: list[tuple[list[int], torch.Tensor]]) -> bool:
    return [o[0] for o in one] == [o[0] for o in other] and all(
        torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("world, workers", [(1, 1), (1, 3), (2, 0), (2, 3), (3, 1), (8, 0), (8, 1)])
def test_global_batches_do_not_depend_on_ranks_or_workers(
    make_set: Callable[..., ShardIndex], world: int, workers: int
) -> None:
    index = make_set(100)
    reference = global_batches(index, 7, 1, micro=24)
    micro = 24 // world if world in (3, 8) else 4
    assert same(global_batches(index, 7, world, micro=micro, workers=workers), reference)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 1), (8, 0)])
def test_stopping_anywhere_and_going_on_changes_nothing(
    make_set: Callable[..., ShardIndex], stop: int, world: int, workers: int
) -> None:
    """An epoch of 100 samples has 5 steps of 24; stop 4 lies before its padded last one."""
    index = make_set(100)
    reference = global_batches(index, 11, 1)
    assert same(global_batches(index, 2, world, start=stop, workers=workers), reference[stop : stop + 2])


def test_each_epoch_has_each_sample_once_and_counts_its_padding(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(100)
    batches = train_batches(index, PLAIN, global_batch=24, micro_batch=8, rank=0, world_size=1, seed=5)
    assert batches.sampler.steps_per_epoch == 5
    for batches_of_epoch in (list(islice(batches, 15)), list(islice(batches, 15, 30))):
        samples = torch.cat([batch.sample_B for batch in batches_of_epoch])
        assert sorted(samples[:100].tolist()) == list(range(100))
        assert samples[100:].tolist() == samples[:20].tolist()
        assert [batch.padded for batch in batches_of_epoch] == [0] * 12 + [4, 8, 8]


def test_set_smaller_than_a_batch(make_set: Callable[..., ShardIndex]) -> None:
    batch = next(iter(train_batches(make_set(5), PLAIN, global_batch=12, micro_batch=12, rank=0, world_size=1, seed=0)))
    assert torch.bincount(batch.sample_B, minlength=5).min() >= 2 and batch.padded == 7


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map_tensors(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("size", [1, 3, 8])
def test_packing_gives_back_the_batch_to_the_bit(size: int) -> None:
    """Odd sizes, every dtype that travels, and fields that are no tensors."""
    generator = torch.Generator().manual_seed(size)

    def random_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        made = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        return made.view(dtype).squeeze(-1)

    maps = MapBatch(
        random_of(torch.int16, size, 5, 3, 7).view(torch.float16), random_of(torch.int16, size, 5, 3, 7),
        random_of(torch.int32, size, 3, 2, 3).view(torch.float32),
    )  # fmt: skip
    valid_B = torch.arange(size) % 2 == 0
    labels_B, sample_B = (random_of(torch.int64, size) for _ in range(2))
    batch = Batch(random_of(torch.uint8, size, 5, 5, 3), labels_B, sample_B, valid_B, padded=2, bad=1, maps=maps)
    packed = pickle.loads(pickle.dumps(PackedBatch.pack(batch)))
    assert len(packed.bytes_n) == packed_size(batch.to("meta"))
    again = packed.unpack(packed.bytes_n)
    for one, other in zip(tensors_of(batch), tensors_of(again), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and other.is_contiguous()
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    assert (again.padded, again.bad) == (2, 1)
    packed = PackedBatch.pack(replace(batch, maps=None))
    assert packed.unpack(packed.bytes_n).maps is None


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_from_shared_buffers_belong_to_the_caller(make_set: Callable[..., ShardIndex], workers: int) -> None:
    """A caller may keep every batch: buffers are reused, and a batch it holds must not change."""
    index = make_set(100)
    batches = train_batches(index, PLAIN, global_batch=6, micro_batch=6, rank=0, world_size=1, seed=0, workers=workers)
    alone = train_batches(index, PLAIN, global_batch=6, micro_batch=6, rank=0, world_size=1, seed=0)
    kept = list(islice(batches, 40))
    for one, other in zip(kept, alone, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
    assert len({one.images_BHWC.untyped_storage().data_ptr() for one in kept}) == 40


def test_buffers_are_reused_and_a_batch_without_one_arrives_all_the_same(make_set: Callable[..., ShardIndex]) -> None:
    dataset = train_batches(make_set(50), PLAIN, global_batch=6, micro_batch=6, rank=0, world_size=1, seed=0).dataset
    buffers = SharedBuffers(2, packed_size(dataset.template()))
    packing, tasks = PackingDataset(dataset, buffers.memory_Sn), buffers.assign(range(9))
    under_way = [next(tasks) for _ in range(3)]
    assert under_way == [(0, 0), (1, 1), (2, NO_BUFFER)]
    packed = [packing[task] for task in under_way]
    assert [one.bytes_n is None for one in packed] == [True, True, False]
    assert [next(tasks), next(tasks)] == [(3, NO_BUFFER), (4, NO_BUFFER)]
    for number in (1, 2, 0):
        found, wanted = packed[number].unpack(buffers.take(packed[number])), dataset[number]
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(wanted), strict=True))
    assert [next(tasks), next(tasks), next(tasks)] == [(5, 1), (6, 0), (7, NO_BUFFER)]


def test_buffer_that_is_too_small_is_not_used(make_set: Callable[..., ShardIndex]) -> None:
    dataset = train_batches(make_set(50), PLAIN, global_batch=6, micro_batch=6, rank=0, world_size=1, seed=0).dataset
    buffers = SharedBuffers(1, packed_size(dataset.template()) - 1)
    packed = PackingDataset(dataset, buffers.memory_Sn)[next(buffers.assign([4]))]
    assert not buffers.memory_Sn[0].any()
    assert torch.equal(packed.unpack(buffers.take(packed)).images_BHWC, dataset[4].images_BHWC)
    assert list(buffers.assign([5])) == [(5, 0)]


def test_too_little_shared_memory_is_one_sentence(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(50)

    def look(disk: SmallDisk) -> None:
        batches = train_batches(
            index, views(100), global_batch=6, micro_batch=6, rank=0, world_size=1, seed=0, workers=1
        )
        disk.resize(300_000)  # a batch has 180,000 bytes of pixels, and there are three buffers
        with pytest.raises(DataError, match="3 batches of 0.2 MiB do not fit into shared memory") as told:
            next(iter(batches))
        assert "\n" not in str(told.value)
        disk.resize(600_000)
        assert len(next(iter(batches)).labels_B) == 6

    on_small_disk(Path("/dev/shm"), look)


def test_stopping_everybody_leaves_the_workers_to_the_training_process(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(24)
    batches = iter(train_batches(index, PLAIN, global_batch=4, micro_batch=4, rank=0, world_size=1, seed=5, workers=2))
    taken = [next(batches)]
    workers = multiprocessing.active_children()
    # torchrun, deepspeed's launcher and some Slurms send TERM to every process; the step is finished all the same
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    taken += islice(batches, 11)
    assert sorted(torch.cat([batch.sample_B for batch in taken]).tolist()) == sorted([*range(24)] * 2)
    for worker in workers:
        assert worker.is_alive()
        worker.terminate()  # as torch does with workers that do not end by themselves, and multiprocessing at exit
        worker.join(10)
        assert worker.exitcode == 0


def test_a_worker_that_has_not_begun_is_not_stopped_by_a_term_to_everybody(
    make_set: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loader._init_worker

    def term_first(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(worker)

    monkeypatch.setattr(loader, "_init_worker", term_first)
    batches = train_batches(make_set(24), PLAIN, global_batch=4, micro_batch=4, rank=0, world_size=1, seed=5, workers=2)
    assert len(list(islice(batches, 6))) == 6


def test_order_is_the_epoch_order(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(100)
    samples = [number for step in global_batches(index, 6, 2) for number in step[0]]
    for epoch, part in ((0, samples[:100]), (1, samples[120:144])):
        wanted = samples_at(np.arange(len(part)), count=100, seed=5, epoch=epoch)
        assert part == wanted.tolist()


def test_views_follow_seed_epoch_and_sample_alone(digits: ShardIndex) -> None:
    """The same sample gets another view in another epoch, and the same one wherever it lies in a batch."""

    def seen(seed: int, epoch: int, micro: int = 48) -> dict[int, torch.Tensor]:
        settings = views(28, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
        batches = train_batches(
            digits, settings, global_batch=48, micro_batch=micro, rank=0, world_size=1, seed=seed, position=1440 * epoch
        )
        found = islice(batches, 1440 // micro)
        return {int(n): image for batch in found for n, image in zip(batch.sample_B, batch.images_BHWC, strict=True)}

    first, again, later, other = seen(0, 0), seen(0, 0, micro=16), seen(0, 1), seen(1, 0)
    assert len(first) == digits.count
    assert all(torch.equal(first[n], again[n]) for n in first)
    for different in (later, other):
        assert sum(torch.equal(first[n], different[n]) for n in first) < 0.05 * digits.count


def test_the_training_process_keeps_its_randomness(digits: ShardIndex) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    settings = views(28, auto_augment="rand-m9", color_jitter=0.4, random_erasing=1)
    next(iter(train_batches(digits, settings, global_batch=8, micro_batch=8, rank=0, world_size=1, seed=0)))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("count, world, batch", [(20, 1, 8), (20, 3, 4), (21, 2, 4), (2, 4, 3), (16, 2, 8), (5, 1, 5)])
def test_evaluation_sees_every_sample_once(
    make_set: Callable[..., ShardIndex], count: int, world: int, batch: int
) -> None:
    index = make_set(count)
    ranks = [
        list(eval_batches(index, EvalSettings(8, 1.0), batch=batch, rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [number for batches in ranks for b in batches for number in b.sample_B[b.valid_B].tolist()]
    assert seen == list(range(count))
    for batches in ranks:
        for one in batches:
            assert one.padded == int((~one.valid_B).sum())
            colours = one.images_BHWC[one.valid_B][:, 0, 0, 0]
            assert colours.tolist() == one.sample_B[one.valid_B].tolist()
            assert one.labels_B[one.valid_B].tolist() == (one.sample_B[one.valid_B] % 3).tolist()


def damage(index: ShardIndex, sample: int) -> None:
    """Overwrite a few bytes in the middle of a sample's image."""
    path = index.folder / index.shards[index.shard_of(sample)].name
    data = bytearray(path.read_bytes())
    place = int(index.members[sample]["offset"]) + 530
    data[place : place + 8] = b"rubbish!"
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_sample_is_an_error_that_names_it(make_set: Callable[..., ShardIndex], workers: int) -> None:
    index = make_set(20)
    damage(index, 9)
    with pytest.raises(DataError, match=r"shard-000001.tar: sample 2 .*00009-set.png.* is damaged") as caught:
        list(eval_batches(index, EvalSettings(8), batch=8, rank=0, world_size=1, workers=workers))
    assert "\n" not in str(caught.value)


def test_damaged_sample_is_skipped_and_counted_where_the_run_allows_it(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(24)
    damage(index, 9)
    damage(index, 21)
    batches: list[Batch] = list(
        islice(
            train_batches(
                index, PLAIN, global_batch=8, micro_batch=8, rank=0, world_size=1, seed=0, on_bad_sample="skip"
            ),
            3,
        )
    )
    assert sum(batch.bad for batch in batches) == 2
    for batch in batches:
        missing = batch.sample_B[~batch.valid_B].tolist()
        assert set(missing) <= {9, 21} and len(missing) == batch.bad
        colours = batch.images_BHWC[:, 4, 4, 0]
        assert torch.equal(batch.labels_B, colours % 3)  # a filled place has the label of the image in it


@pytest.mark.parametrize("micro, world", [(5, 1), (8, 2), (24, 2)])
def test_batch_that_does_not_divide_is_refused(make_set: Callable[..., ShardIndex], micro: int, world: int) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        train_batches(make_set(30), PLAIN, global_batch=24, micro_batch=micro, rank=0, world_size=world, seed=0)


def test_position_between_steps_is_refused(make_set: Callable[..., ShardIndex]) -> None:
    with pytest.raises(DataError, match="position 7"):
        train_batches(make_set(30), PLAIN, global_batch=24, micro_batch=24, rank=0, world_size=1, seed=0, position=7)
