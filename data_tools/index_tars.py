"""Makes an index for WebDataset tars that exist already, without copying a byte.

    python data_tools/shard.py index wds                                      → wds/index.json
    python data_tools/shard.py index 'wds/imagenet1k-train-{0000..1023}.tar'  → wds/imagenet1k-train/index.json
    python data_tools/shard.py index /readonly/wds --out indexes/train        → indexes/train/index.json

Samples are <key>.jpg with <key>.cls or a "label" in <key>.json, as timm and img2dataset write them. Every byte is read
once, for the checksums. The folder of the index is then named in the run file, checked by verify.py and annotated by
annotate.py like any set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from refiner_ds.command_line import Parser
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.webdataset_index import TarScan, index_existing
from refiner_ds.errors import DataError, report_errors

from .class_lists import read_class_list
from .console import Progress
from .staging import interruptible, parallel_map


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="shard.py index", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("tars", help="folder of tars, or a pattern with {0000..1023} or * in it")
    add("--out", type=Path, help="folder for the index (default: with the tars)")
    add("--classes", type=Path, help="class names in the order in which the tars number them, from 0")
    add("--like", metavar="SET", help="take the class names from this set, which numbers them alike")
    add("--image", metavar="EXTENSION", help="which member is the image, where samples have several")
    add("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    return parser


def _class_names(given: argparse.Namespace) -> list[str] | None:
    if given.classes and given.like:
        raise DataError("--classes and --like: both name the classes; give one of them")
    if given.like:
        return open_index(given.like, check_files=False).classes
    if not given.classes:
        return None
    listed = read_class_list(given.classes)
    if listed.by_number is None:
        return listed.names
    if 0 not in listed.by_number:
        raise DataError(f"{given.classes}: numbers classes from 1, tars from 0; list names in the tars' order")
    return [listed.by_number[number] for number in range(len(listed.names))]


@report_errors
def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    if given.processes < 1:
        raise DataError("--processes must be above 0")

    def scan(function: Callable[[Path], TarScan], paths: list[Path]) -> Iterator[TarScan]:
        with Progress(len(paths), "tars", "tars") as progress:
            for found in parallel_map(function, paths, given.processes):
                progress.update(1)
                yield found

    with interruptible():
        folder = index_existing(given.tars, given.out, _class_names(given), given.image, scan)
    print(ShardIndex.load(folder).describe())
    return 0
