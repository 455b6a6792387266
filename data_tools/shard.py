"""Turns images into a shard set.

    python data_tools/shard.py imagenet/train shards/train [--maps published_score_maps]
    python data_tools/shard.py imagenet/val shards/val --like shards/train \\
        --labels ILSVRC2012_validation_ground_truth.txt --classes ILSVRC2012_devkit_t12/data/meta.mat
    python data_tools/shard.py pictures shards/train --labels labels.csv
    python data_tools/shard.py 'beans/data/train-*.parquet' shards/train
    python data_tools/shard.py index imagenet-1k-wds            WebDataset tars as they are; see shard.py index --help

The source is a folder of class folders, a folder of images with a label file, or Parquet files as the Hugging Face hub
has them. Samples are shuffled once by a seed and cut into tars; image files are kept byte for byte. The same source and
settings give the same bytes for any number of processes, and a killed run resumes when it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds.command_line import Parser
from refiner_ds.data.image_tree import LabelledImage, LabelledImages, printable, read_class_folders
from refiner_ds.data.index import INDEX_NAME, ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.errors import DataError, report_errors

from . import index_tars
from .builder import NOTES_NAME, Built, Inspect, Plan, build_set
from .class_lists import ClassList, read_class_list
from .image_files import plan_from_files
from .inspection import add_max_megapixels
from .labels import read_labelled_files
from .parquet import is_parquet, plan_from_parquet

SHOWN_CLASSES = 5


def plan(given: argparse.Namespace) -> Plan:
    """The set that the arguments ask for.

    Raises:
        DataError: the source is not what it should be, or an argument would go unused.
    """
    class_list = read_class_list(given.classes) if given.classes else None
    like = _classes_of(given.like) if given.like else None
    shard_bytes = int(given.shard_mb * 1e6)
    if is_parquet(given.source):
        _refuse_unused(given, "Parquet files hold labels of their own", "labels", "count_from", "maps")
        return plan_from_parquet(given.source, given.seed, shard_bytes, class_list, like, given.label_column)
    _refuse_unused(given, "is for Parquet files", "label_column")
    if given.labels:
        source = read_labelled_files(given.source, given.labels, class_list, like, given.count_from)
    else:
        _refuse_unused(given, "class folders name the classes; it goes with --labels", "classes", "count_from")
        source = read_class_folders(given.source)
        if like:
            source = _relabelled(source, like)
    return plan_from_files(source, given.seed, shard_bytes, given.maps)


def _check_places(source: Path, out: Path) -> None:
    """Refuse what is no source, and a set that would become part of it."""
    if out.exists():
        raise DataError(f"{printable(out)}: already exists; choose another folder or remove it")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{printable(out)}: lies in {printable(source)}, which is to be read; choose another folder")
    if source.is_file() and not is_parquet(source):
        advice = "index it with shard.py index" if source.suffix == ".tar" else "unpack it, and name the folder"
        raise DataError(f"{printable(source)}: a file, where a folder of images is wanted; {advice}")
    if (source / INDEX_NAME).is_file():
        raise DataError(f"{printable(source)}: is a shard set already; name a folder of images")
    if source.is_dir() and not any(entry.is_dir() for entry in source.iterdir()) and any(source.glob("*.tar")):
        raise DataError(f"{printable(source)}: holds tars; index them with shard.py index, or unpack them")


def _classes_of(spec: str) -> ClassList:
    """The classes of an existing set."""
    index = open_index(spec, check_files=False)
    return ClassList(index.folder, index.classes)


def _refuse_unused(given: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(given, name) is not None:
            raise DataError(f"--{name.replace('_', '-')}: not used, {why}; leave it out")


def _relabelled(source: LabelledImages, like: ClassList) -> LabelledImages:
    """The same images with the labels of another set's classes."""
    for name in source.classes:
        if name not in like.names:
            raise DataError(f"{printable(source.folder / name)}: class {name}, {like.not_listed(name)}")
    position = {name: label for label, name in enumerate(like.names)}
    images = [LabelledImage(im.path, im.size, position[source.classes[im.label]]) for im in source.images]
    return LabelledImages(source.folder, images, like.names, source.ignored)


def _print_summary(out: Path, built: Built) -> None:
    print(ShardIndex.load(out).describe())
    if built.notes:
        kinds = [note.partition(":")[0] for note in built.notes]
        counts = [f"{kinds.count(kind)} {kind}" for kind in ("kept", "left out", "ignored") if kind in kinds]
        print(f"files with notes: {', '.join(counts)}; see {printable(out / NOTES_NAME)}")
    if empty := built.empty_classes:
        more = f" and {len(empty) - SHOWN_CLASSES} more" if len(empty) > SHOWN_CLASSES else ""
        print(
            f"warning: {len(empty)} class{'es' * (len(empty) > 1)} without a sample: "
            f"{', '.join(empty[:SHOWN_CLASSES])}{more}",
            file=sys.stderr,
        )


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="shard.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="folder of class folders, folder of images (--labels), or Parquet files")
    add("out", type=Path, help="folder of the shard set; must not exist yet")
    add("--labels", type=Path, help="labels of the images: a table of file and class, or one class a line")
    add(
        "--classes",
        type=Path,
        help="what class numbers in the labels stand for: class names in the order in which they are\n"
        "numbered, or meta.mat or map_clsloc.txt of ImageNet's devkit",
    )
    add("--count-from", type=int, choices=(0, 1), help="where numbers that count --classes begin")
    add("--like", metavar="SET", help="take classes and their order from this set (default: sorted by name)")
    add("--label-column", help="column of a Parquet file, where several may be the label")
    add("--maps", type=Path, help="folder of published score maps, <class>/<image>.pt")
    add("--seed", type=int, default=0, help="of the shuffle (default %(default)s)")
    add("--shard-mb", type=float, default=256, help="size of a tar in MB, about (default %(default)s)")
    add_max_megapixels(parser, "leave out larger images")
    add("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    add("--decode", action="store_true", help="decode every image to find broken pixels; far slower")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["index"]:
        return index_tars.main(arguments[1:])
    given = _arguments().parse_args(arguments)
    if min(given.shard_mb, given.processes, given.max_megapixels) <= 0:
        raise DataError("--shard-mb, --processes and --max-megapixels must be above 0")
    _check_places(given.source, given.out)
    inspect = Inspect(given.decode, int(given.max_megapixels * 1e6))
    built = build_set(plan(given), given.out, inspect, given.processes)
    _print_summary(given.out, built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
