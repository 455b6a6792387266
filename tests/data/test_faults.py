"""Every fault of a set gives its promised error, or its counted skip; nothing is lost silently and nothing mixed up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import MapFormat, ShardIndex, find_maps
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.samples import RawSample
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from tests.data.conftest import png, views

COUNT, PER_SHARD = 21, 7
BROKEN = "shard-000001.tar"  # samples 7 to 13


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def swap(data: bytearray, one: int, other: int, size: int) -> None:
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def flip_bit(data: bytearray, place: int) -> None:
    data[place] ^= 4


def put(data: bytearray, place: int, what: bytes) -> None:
    data[place : place + len(what)] = what


CUT, DAMAGED = "is cut off", "is damaged or of another set"

# What is done to the second shard, given where its third sample's header lies; which samples are lost by it; and what
# is said of the first of them.
FAULTS: dict[str, tuple[Callable[[Path, int], object], range, str]] = {
    "shard missing": (lambda path, at: path.unlink(), range(7, 14), "cannot be read (No such file"),
    "shard empty": (lambda path, at: path.write_bytes(b""), range(7, 14), CUT),
    "cut at a member's boundary": (lambda path, at: path.write_bytes(path.read_bytes()[:at]), range(9, 14), CUT),
    "cut inside a member": (lambda path, at: path.write_bytes(path.read_bytes()[: at + 540]), range(9, 14), CUT),
    "cut inside a header": (lambda path, at: path.write_bytes(path.read_bytes()[: at + 100]), range(9, 14), CUT),
    "garbage in a header": (lambda path, at: rewrite(path, lambda d: put(d, at + 120, b"!!!")), range(9, 10), DAMAGED),
    "garbage in a name": (
        lambda path, at: rewrite(path, lambda d: put(d, at, b"\xff\x00\xfe")),
        range(9, 10),
        "found as '\N{REPLACEMENT CHARACTER}') is damaged",
    ),
    "one bit of an image": (lambda path, at: rewrite(path, lambda d: flip_bit(d, at + 560)), range(9, 10), DAMAGED),
    "bytes swapped in an image": (
        lambda path, at: rewrite(path, lambda d: swap(d, at + 520, at + 540, 8)),
        range(9, 10),
        DAMAGED,
    ),
    "two samples swapped": (
        lambda path, at: rewrite(path, lambda d: swap(d, at, at + 2048, 1536)),
        range(9, 11),
        "found as '00010-set.png') is damaged",
    ),
    "shard of another set": (
        lambda path, at: shutil.copy(path.with_name("shard-000000.tar"), path),
        range(7, 14),
        "found as '00000-set.png') is damaged",
    ),
    "a folder in its place": (
        lambda path, at: (path.unlink(), path.mkdir()),
        range(7, 14),
        "cannot be read (Is a directory)",
    ),
}


@pytest.fixture(params=FAULTS)
def broken(request: pytest.FixtureRequest, make_set: Callable[..., ShardIndex]) -> tuple[ShardIndex, range, str]:
    index = make_set(COUNT, PER_SHARD)
    change, lost, says = FAULTS[request.param]
    change(index.folder / BROKEN, int(index.members[9]["offset"]))
    return ShardIndex.load(index.folder, check_files=False), lost, says


def test_fault_is_an_error_that_names_shard_and_sample(broken: tuple[ShardIndex, range, str]) -> None:
    index, lost, says = broken
    with pytest.raises(DataError) as told:
        list(eval_batches(index, EvalSettings(8, 1.0), batch=4, rank=0, world_size=1))
    sentence = str(told.value)
    assert BROKEN in sentence and f"sample {lost[0] - 7} " in sentence and f"(number {lost[0]} " in sentence
    assert says in sentence and "\n" not in sentence


@pytest.mark.parametrize("workers", [0, 2])
def test_fault_is_skipped_and_counted_and_nothing_else_is_lost(
    broken: tuple[ShardIndex, range, str], workers: int
) -> None:
    index, lost, _ = broken
    batches = list(
        eval_batches(index, EvalSettings(8, 1.0), batch=4, rank=0, world_size=1, on_bad_sample="skip", workers=workers)
    )
    assert sum(batch.bad for batch in batches) == len(lost)
    seen = {
        int(n): int(c)
        for b in batches
        for n, c in zip(b.sample_B[b.valid_B], b.images_BHWC[b.valid_B][:, 0, 0, 0], strict=True)
    }
    assert seen == {number: number for number in range(COUNT) if number not in lost}


def test_sizes_tell_most_faults_before_a_run_begins(broken: tuple[ShardIndex, range, str]) -> None:
    """Where a file's length gives it away, loading refuses; the others wait for the sample or for verify.py."""
    index, *_ = broken
    path = index.folder / BROKEN
    if not path.is_file() or path.stat().st_size != index.shards[1].bytes:
        with pytest.raises(DataError, match=BROKEN):
            ShardIndex.load(index.folder)
    else:
        assert ShardIndex.load(index.folder).count == COUNT


def test_batch_of_nothing_but_damage_is_an_error_even_where_skipping_is_allowed(
    make_set: Callable[..., ShardIndex],
) -> None:
    index = make_set(COUNT, PER_SHARD)
    for shard in index.shards:
        (index.folder / shard.name).unlink()
    batches = train_batches(
        index, views(8), global_batch=4, micro_batch=4, rank=0, world_size=1, seed=0, on_bad_sample="skip"
    )
    with pytest.raises(DataError, match="all 4 samples of a micro-batch are damaged"):
        next(iter(batches))


def test_sound_bytes_that_are_no_image(tmp_path: Path) -> None:
    with SetWriter(tmp_path / "set", ["a"], 4) as writer:
        for number in range(4):
            good = png(np.full((8, 8, 3), number, np.uint8))
            writer.add(f"{number}", b"\xff\xd8\xff but no picture" if number == 2 else good, "jpg", 0)
    index = ShardIndex.load(tmp_path / "set")
    with pytest.raises(DataError, match=r"shard-000000.tar: sample 2 \(2.jpg\): the image cannot be decoded"):
        list(eval_batches(index, EvalSettings(8, 1.0), batch=4, rank=0, world_size=1))
    (batch,) = eval_batches(index, EvalSettings(8, 1.0), batch=4, rank=0, world_size=1, on_bad_sample="skip")
    assert batch.bad == 1 and batch.valid_B.tolist() == [True, True, False, True]


def test_sixteen_bits_of_grey_keep_their_shades() -> None:
    grey_yx = np.linspace(0, 65535, 256).reshape(16, 16).round().astype(np.uint16)
    raw = RawSample(memoryview(png(grey_yx)), memoryview(b""), 0, "scan.png", "shard-000000.tar", 0)
    pixels_yx3 = decode_image(raw)
    assert (pixels_yx3 == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all() and pixels_yx3.dtype == np.uint8


GRID = MapFormat(2, 3, 3)


def score_map(rows: int = 3, number: int = 0, value: int = 1) -> bytes:
    return encode(ScoreMap(np.full((2, rows, 3), value, np.float16), np.full((2, rows, 3), number, np.int16), 0))


def map_set(folder: Path, change: Callable[[int], bytes], keys: str = "{}") -> ShardIndex:
    """Images with a parallel set of maps; ``change`` makes the map of each number."""
    with SetWriter(folder / "set", ["a"], PER_SHARD) as writer:
        for number in range(10):
            writer.add(f"{number}", png(np.full((8, 8, 3), number, np.uint8)), "png", 0)
    with SetWriter(folder / "set.maps", ["a"], PER_SHARD, GRID) as writer:
        for number in range(10):
            writer.add_map(keys.format(number), change(number), 0)
    return ShardIndex.load(folder / "set")


def two_batches(index: ShardIndex, on_bad: str) -> int:
    batches = train_batches(
        index, views(8), global_batch=5, micro_batch=5, rank=0, world_size=1, seed=0,
        on_bad_sample=on_bad, maps=find_maps(index),
    )  # fmt: skip
    running = iter(batches)
    return next(running).bad + next(running).bad


@pytest.mark.parametrize(
    "wrong", [score_map(rows=4), b"RMAP\x07rubbish", score_map()[:-9], score_map(number=1), score_map(number=-1)]
)
def test_map_of_the_wrong_grid_or_classes_or_damaged(tmp_path: Path, wrong: bytes) -> None:
    index = map_set(tmp_path, lambda number: wrong if number == 6 else score_map())
    with pytest.raises(DataError, match=r"set.maps/shard-000000.tar: sample 6 \(6.map\)"):
        two_batches(index, "error")
    assert two_batches(index, "skip") == 1


def test_filled_place_has_the_map_of_the_image_in_it(tmp_path: Path) -> None:
    """Every image's map says the image's number; sample 6 is lost, and its place holds a neighbour, map included."""
    index = map_set(tmp_path, lambda number: b"" if number == 6 else score_map(value=number))
    batches = train_batches(
        index, views(8), global_batch=5, micro_batch=5, rank=0, world_size=1, seed=0,
        on_bad_sample="skip", maps=find_maps(index),
    )  # fmt: skip
    filled = 0
    for batch in islice(batches, 2):
        assert batch.maps is not None
        numbers = batch.images_BHWC[:, 0, 0, 0]
        assert batch.maps.values_BKhw[:, 0, 0, 0].tolist() == numbers.tolist()
        assert torch.equal(numbers[batch.valid_B], batch.sample_B[batch.valid_B])
        filled += int((~batch.valid_B).sum())
    assert filled == 1


def test_maps_of_other_images_are_refused_at_once(tmp_path: Path) -> None:
    index = map_set(tmp_path, lambda number: score_map(), keys="other-{}")
    with pytest.raises(DataError, match="its maps are not those of"):
        find_maps(index)


def test_set_without_maps_is_refused_where_maps_are_wanted(make_set: Callable[..., ShardIndex]) -> None:
    with pytest.raises(DataError, match="no score maps; make some with data_tools/annotate.py"):
        find_maps(make_set(3))
