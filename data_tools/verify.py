"""Checks a shard set against its index: sizes, checksums, keys, and whether every image and map decodes.

    python data_tools/verify.py shards/train
    python data_tools/verify.py https://host/sets/train      # fetches the whole set into the cache and checks it

Exit code 0: no errors; 1: errors were found; 2: there is no set to check.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds.command_line import Parser
from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import MEMBERS_NAME, ShardIndex, find_maps, maps_folder
from refiner_ds.data.locate import open_index
from refiner_ds.data.remote import fetch_shard
from refiner_ds.data.samples import RawSample, SampleReader
from refiner_ds.data.score_maps import decode as decode_map
from refiner_ds.data.tar_format import read_members, split_name
from refiner_ds.errors import DataError, report_errors

from .console import Progress
from .inspection import add_max_megapixels
from .staging import interruptible, parallel_map


@dataclass
class ShardReport:
    """What checking one shard found: one sentence for each error, and a 64-bit hash of every key."""

    errors: list[str]
    keys: np.ndarray


def check_shard(index: ShardIndex, number: int, decode: DecodeKeys | None) -> ShardReport:
    """Compare one tar with the index, byte by byte and sample by sample; decode images unless ``decode`` is None."""
    shard, path = index.shards[number], index.shard_path(number)
    try:
        errors, keys = _check_file(fetch_shard(index, number), shard.sha256)
    except DataError as error:
        return ShardReport([f"{path}: {error}"], np.zeros(0, np.uint64))
    except OSError as error:
        return ShardReport([f"{path}: cannot be read ({error.strerror})"], np.zeros(0, np.uint64))
    if len(keys) != shard.count:
        errors.append(f"{path}: {len(keys)} samples where the index says {shard.count}")
    elif hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest() != shard.keys_sha256:
        errors.append(f"{path}: its keys are not those the index was written with")
    reader = SampleReader(index)
    for sample in range(int(index.starts[number]), int(index.starts[number + 1])):
        try:
            raw = reader.read(sample)
            if not 0 <= raw.label < len(index.classes):
                errors.append(f"{raw.location}: label {raw.label}, but there are {len(index.classes)} classes")
            if decode is not None and not index.is_maps_only:
                decode_image(raw, decode)
            if index.has_maps:
                errors += _map_errors(raw, index)
        except DataError as error:
            errors.append(str(error))
    return ShardReport(
        errors, np.array([xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")) for key in keys], np.uint64)
    )


def _map_errors(raw: RawSample, index: ShardIndex) -> list[str]:
    """What is wrong with a sample's score map."""
    score_map = decode_map(raw.score_map, raw.location)
    errors = []
    if score_map.format != index.maps:
        errors.append(f"{raw.location}: its map is {score_map.format} where the set's are {index.maps}")
    if score_map.label != raw.label:
        errors.append(f"{raw.location}: its map says label {score_map.label} where the index says {raw.label}")
    if not 0 <= score_map.classes_Khw.min() <= score_map.classes_Khw.max() < len(index.classes):
        errors.append(f"{raw.location}: its map names classes that are not among the set's {len(index.classes)}")
    return errors


def _check_file(path: Path, sha256: str) -> tuple[list[str], list[str]]:
    """Faults of a tar as a file, and its keys in order."""
    data = path.read_bytes()
    errors = [] if hashlib.sha256(data).hexdigest() == sha256 else [f"{path}: checksum differs from the index"]
    keys: list[str] = []
    try:
        for member in read_members(io.BytesIO(data)):
            key, _ = split_name(member.name)
            if key and (not keys or keys[-1] != key):
                keys.append(key)
    except ValueError as error:
        errors.append(f"{path}: {error}")
    return errors, keys


_checked: tuple[ShardIndex, DecodeKeys | None] | None = None  # the set a worker checks, and whether it decodes images


def _init_worker(index: ShardIndex, decode: DecodeKeys | None) -> None:
    global _checked
    _checked = index, decode


def _check(number: int) -> ShardReport:
    assert _checked is not None
    index, decode = _checked
    return check_shard(index, number, decode)


def check_set(index: ShardIndex, processes: int, decode: DecodeKeys | None) -> Iterator[str]:
    """Yield every error of a set, one sentence each."""
    members = index.members
    order = np.flatnonzero(np.diff(members["offset"].astype(np.int64)) <= 0) + 1
    if set(order.tolist()) - set(index.starts.tolist()):
        yield f"{index.folder / MEMBERS_NAME}: offsets do not grow within a shard"
    seen: list[np.ndarray] = []
    with Progress(index.count, index.folder.name) as progress:
        reports = parallel_map(
            _check, range(len(index.shards)), processes, initializer=_init_worker, initargs=(index, decode)
        )
        for number, report in enumerate(reports):
            for error in report.errors:
                progress.clear()
                yield error
            seen.append(report.keys)
            progress.update(index.shards[number].count)
    try:
        if maps_folder(index.folder).exists():
            find_maps(index)
    except DataError as error:
        yield str(error)
    keys, times = np.unique(np.concatenate(seen) if seen else np.zeros(0), return_counts=True)
    if len(keys) and times.max() > 1:
        yield f"{index.folder}: {int((times > 1).sum())} keys occur more than once; create the set again"


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="verify.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("set", help="folder of a shard set; or a URL, every shard of which is then fetched")
    parser.add_argument("--cache", type=Path, help="folder for fetched sets (default: as in training)")
    parser.add_argument("--no-decode", action="store_true", help="check bytes only; do not decode images")
    add_max_megapixels(parser, "larger images are errors")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    if given.max_megapixels <= 0:
        raise DataError("--max-megapixels must be above 0")
    index = open_index(given.set, given.cache, check_files=False, class_folders=False)
    errors = 0
    decode = None if given.no_decode else DecodeKeys(max_megapixels=given.max_megapixels)
    with interruptible():
        for error in check_set(index, max(1, given.processes), decode):
            errors += 1
            print(error)
    print(f"{index.describe()}: {errors or 'no'} error{'s' * (errors != 1)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
