"""Turns a tree of images into a shard set.

    python data_tools/shard.py imagenet/train shards/train [--maps published_score_maps]
    python data_tools/shard.py imagenet/val shards/val --labels ground_truth.txt --classes synsets.txt

Samples are shuffled once by a seed and cut into tars; image files are kept byte for byte. The same source and settings
give the same bytes for any number of processes, and a killed run resumes when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds.data.index import MapFormat, ShardIndex
from refiner_ds.data.score_maps import encode, read_published
from refiner_ds.data.tar_format import BLOCK, padded
from refiner_ds.data.writer import FinishedShard, ShardWriter, shard_name, write_whole
from refiner_ds.errors import DataError, report_errors

from .inspection import inspect_image
from .sources import Source, SourceImage, check_maps, class_folders, flat_files, map_path
from .staging import load_progress, parallel_map, publish_set, save_progress, staging_folder

KEY_STEM = 70  # bytes of a file name that go into its key; number, ending and a margin fill a tar header's 100
NOTES_NAME = "notes.txt"


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its number, and key and source of its samples in order."""

    number: int
    partial: Path
    folder: Path
    samples: list[tuple[str, SourceImage]]
    maps: Path | None
    map_format: MapFormat | None
    classes: int
    decode: bool


def key_of(position: int, image: SourceImage) -> str:
    """A key that no other sample has, and that still tells a person which file it was."""
    stem = os.path.splitext(os.path.basename(image.path))[0]
    return f"{position:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:KEY_STEM]}"


def write_shard(task: ShardTask) -> tuple[FinishedShard, list[str]]:
    """Write one shard, or take it from an earlier run; returns it and one line for every file with a note."""
    if earlier := load_progress(task.partial, shard_name(task.number)):
        return earlier
    writer = ShardWriter(task.partial / shard_name(task.number))
    notes = []
    try:
        for key, image in task.samples:
            path = task.folder / image.path
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable or remove it") from None
            found = inspect_image(data, image.path, task.decode)
            if found.error:
                notes.append(f"left out: {image.path}: {found.error}")
                continue
            if found.note:
                notes.append(f"kept: {image.path}: {found.note}")
            writer.add(key, data, found.extension, image.label, _score_map(task, image))
        finished = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    save_progress(task.partial, finished, notes)
    return finished, notes


def _score_map(task: ShardTask, image: SourceImage) -> bytes | None:
    """The record of an image's published map."""
    if task.maps is None:
        return None
    path = task.maps / map_path(image.path)
    score_map = read_published(path, image.label, task.classes)
    if score_map.format != task.map_format:
        raise DataError(f"{path}: its map is {score_map.format}, others are {task.map_format}; all must be alike")
    return encode(score_map)


def split_into_shards(
    source: Source, seed: int, shard_bytes: int, map_bytes: int = 0
) -> list[list[tuple[str, SourceImage]]]:
    """Shuffle all samples by the seed and split them into shards of nearly equal count and about ``shard_bytes``."""
    count = len(source.images)
    beside = BLOCK + padded(map_bytes or 1)  # the map, or the label
    stored = sum(BLOCK + padded(image.size) + beside for image in source.images)
    shards = max(1, -(-stored // shard_bytes))
    shuffled = [source.images[number] for number in np.random.RandomState(seed).permutation(count)]
    bounds = [count * number // shards for number in range(shards + 1)]
    return [
        [(key_of(position, shuffled[position]), shuffled[position]) for position in range(start, end)]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def write_set(
    source: Source, out: Path, *, seed: int, shard_bytes: int, processes: int, decode: bool, maps: Path | None = None
) -> list[str]:
    """Write the whole set; returns the notes.

    Raises:
        DataError: the target exists or cannot be written, a file cannot be read, images and maps do not match, or no
            image can be read.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; choose another folder or remove it")
    map_format, map_bytes = None, 0
    if maps is not None:
        check_maps(source, maps)
        first = read_published(maps / map_path(source.images[0].path), 0, len(source.classes))
        map_format, map_bytes = first.format, len(encode(first))
    shards = split_into_shards(source, seed, shard_bytes, map_bytes)
    listing = hashlib.sha256(repr([(image.path, image.label, image.size) for image in source.images]).encode())
    inputs = {
        "samples": listing.hexdigest(),
        "seed": seed,
        "shards": len(shards),
        "decode": decode,
        "maps": asdict(map_format) if map_format else None,
    }
    partial = out.with_name(out.name + ".partial")
    with staging_folder(partial, inputs):
        tasks = [
            ShardTask(number, partial, source.folder, samples, maps, map_format, len(source.classes), decode)
            for number, samples in enumerate(shards)
        ]
        finished, notes = [], [f"ignored: {path}: not an image by its name" for path in source.ignored]
        with tqdm(total=len(source.images), unit="img", desc=out.name, disable=None) as bar:
            for task, (shard, shard_notes) in zip(tasks, parallel_map(write_shard, tasks, processes), strict=True):
                finished.append(shard)
                notes += shard_notes
                bar.update(len(task.samples))
        if not sum(shard.shard.count for shard in finished):
            raise DataError(f"{source.folder}: not one image can be read; see {partial}")
        if notes:
            write_whole(partial / NOTES_NAME, ("\n".join(notes) + "\n").encode())
        publish_set(partial, out, finished, source.classes, map_format)
    return notes


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shard.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with a folder of images for every class, or flat files")
    parser.add_argument("out", type=Path, help="folder of the shard set; must not exist yet")
    parser.add_argument("--labels", type=Path, help="for flat files: '<file> <class>' lines, or one class a line")
    parser.add_argument("--classes", type=Path, help="class names in the order of labels, one a line (with --labels)")
    parser.add_argument("--maps", type=Path, help="folder of published score maps, <class>/<image>.pt")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default %(default)s)")
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a tar in MB, about (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--decode", action="store_true", help="decode every image to find broken pixels; far slower")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    if given.shard_mb <= 0 or given.processes < 1:
        raise DataError("--shard-mb and --processes must be above 0")
    if given.labels:
        source = flat_files(given.source, given.labels, given.classes)
    else:
        source = class_folders(given.source)
    notes = write_set(
        source,
        given.out,
        seed=given.seed,
        shard_bytes=int(given.shard_mb * 1e6),
        processes=given.processes,
        decode=given.decode,
        maps=given.maps,
    )
    print(ShardIndex.load(given.out).describe())
    if notes:
        print(
            f"{len(notes)} files with notes, {sum(n.startswith('left') for n in notes)} of them left out: "
            f"{given.out / NOTES_NAME}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
