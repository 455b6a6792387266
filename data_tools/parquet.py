"""Samples from Parquet files as the Hugging Face hub publishes image sets: a column of images, a column of labels.

    data/train-00000-of-00005.parquet …    image: {bytes, path}, label: int64; class names in the schema's metadata

A row group is read once and whole, so files of any size pass through the memory of a shard. Row groups are shuffled by
the seed and cut into shards, and each shard's rows are shuffled; training shuffles over the whole set in any case.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.data.image_tree import printable
from refiner_ds.errors import DataError

from .builder import Plan, Sample
from .class_lists import ClassList, sort_classes
from .image_files import key_of

EXTENSION = ".parquet"
PIECE = re.compile(r"(.+?)[-.](\d+)-of-(\d+)")  # as Hugging Face names the pieces of a split
MOST_FOLDERS = 20
IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels")


@dataclass(frozen=True)
class Rows:
    """Some rows of a row group, and what they take in bytes, about."""

    file: Path
    group: int
    start: int
    end: int
    bytes: int


@dataclass(frozen=True)
class Columns:
    """Names of the columns, and the class names that label numbers stand for (None: labels are names themselves)."""

    image: str
    label: str
    names: dict[int, str] | None
    has_paths: bool


@dataclass(frozen=True)
class ParquetSamples:
    """The samples of a shard, as rows of Parquet files; the first of them has this position in the set."""

    first: int
    rows: list[Rows]
    columns: Columns
    label_of: dict[str, int]
    seed: int

    @property
    def count(self) -> int:
        """Samples there are."""
        return sum(part.end - part.start for part in self.rows)

    def read(self) -> Iterator[Sample]:
        """The samples, shuffled.

        Raises:
            DataError: a file cannot be read, or a row has no image or no label.
        """
        found = [sample for part in self.rows for sample in self._read_rows(part)]
        order = np.random.RandomState((self.seed + self.first) % 2**32).permutation(len(found))
        for position, number in enumerate(order.tolist(), self.first):
            name, image, label = found[number]
            yield Sample(key_of(position, name), name, image, label)

    def _read_rows(self, part: Rows) -> Iterator[tuple[str, bytes, int]]:
        columns = self.columns
        wanted = [f"{columns.image}.bytes", f"{columns.image}.path"] if columns.has_paths else [columns.image]
        try:
            group = _open(part.file).read_row_group(part.group, columns=[*wanted, columns.label])
            table = group.slice(part.start, part.end - part.start).to_pydict()
        except Exception as error:  # pyarrow raises a dozen kinds at damage
            raise DataError(f"{printable(part.file)}: cannot be read ({_first_line(error)}); fetch it again") from None
        for row, (cell, label) in enumerate(zip(table[columns.image], table[columns.label], strict=True), part.start):
            place = f"{printable(part.file)}: row {row} of row group {part.group}"
            image = cell.get("bytes") if isinstance(cell, dict) else cell
            if image is None:
                raise DataError(f"{place} holds no image, only a path perhaps; fetch a copy with the images in it")
            name = (isinstance(cell, dict) and cell.get("path")) or f"{part.file.stem}-{part.group}-{row}"
            yield name, image, self._label(label, place)

    def _label(self, label: Any, place: str) -> int:
        names = self.columns.names
        if label in (None, -1, ""):  # -1: of a split whose labels are kept back
            raise DataError(f"{place} has no label; take a split with labels")
        if names is not None and label not in names:
            raise DataError(
                f"{place} has label {label}, but there are {len(names)} classes, {min(names)} to {max(names)}; "
                "name all of them"
            )
        return self.label_of[str(label) if names is None else names[label]]


def is_parquet(source: Path) -> bool:
    """Whether a source is a Parquet file, a folder of them, or a pattern for them."""
    return bool(source.suffix == EXTENSION or (source.is_dir() and _files(source)))


def plan_from_parquet(
    source: Path,
    seed: int,
    shard_bytes: int,
    class_list: ClassList | None = None,
    like: ClassList | None = None,
    label_column: str | None = None,
) -> Plan:
    """Plan a set from Parquet files.

    Args:
        source: a file, a folder, or a pattern; one split.
        seed: of the shuffle.
        shard_bytes: of a shard, about.
        class_list: names that label numbers stand for, counted from 0 where the list does not number them itself, in
            place of those in the files; of labels that are names, all that there are.
        like: the classes, in order, of a set whose labels this one is to share.
        label_column: where several could be meant.
    Raises:
        DataError: pyarrow is missing, files are missing or of several splits, the columns are not recognised or not
            the same in all files, or a label is not in the list.
    """
    files = _one_split(source)
    columns = _columns(files[0], class_list, label_column)
    for file in files[1:]:
        if _columns(file, class_list, label_column) != columns:
            raise DataError(
                f"{printable(file)}: its columns or class names are not those of {printable(files[0])}; "
                "make a set of each, or say with --classes what numbers stand for"
            )
    if columns.names is not None:
        names = [columns.names[number] for number in sorted(columns.names)]
    else:
        names = _names_that_occur(files, columns.label)
        if class_list:
            _refuse_others(source, names, class_list)
            names = sort_classes(class_list.names)
    classes = like.names if like else names
    label_of = {name: label for label, name in enumerate(classes)}
    if like:
        _refuse_others(source, names, like)
    parts = [part for file in files for part in _parts(file, columns, shard_bytes)]
    shuffled = [parts[number] for number in np.random.RandomState(seed).permutation(len(parts))]
    shards = _cut(shuffled, shard_bytes)
    firsts = np.cumsum([0] + [sum(part.end - part.start for part in shard) for shard in shards]).tolist()
    listing = repr([(part.file.name, part.group, part.start, part.end, part.bytes) for part in parts])
    return Plan(
        source,
        classes,
        [ParquetSamples(first, shard, columns, label_of, seed) for first, shard in zip(firsts, shards, strict=False)],
        {"samples": hashlib.sha256(listing.encode()).hexdigest(), "classes": classes, "seed": seed},
    )


def _refuse_others(source: Path, names: list[str], listed: ClassList) -> None:
    for name in names:
        if name not in listed.names:
            raise DataError(f"{printable(source)}: has class {name}, {listed.not_listed(name)}")


def _files(source: Path) -> list[Path]:
    """The files that a source names: a folder's own, or those in a few folders in it, as repositories have them."""
    if not source.is_dir():
        return sorted(map(Path, glob.glob(str(source))))
    folders = sorted(entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    places = [source, *(folders if len(folders) <= MOST_FOLDERS else [])]  # more are class folders
    return [file for place in places for file in sorted(place.glob(f"[!.]*{EXTENSION}"))]


def _one_split(source: Path) -> list[Path]:
    """All files of a split, none missing."""
    files = _files(source)
    if not files:
        raise DataError(f"{printable(source)}: no such file; name {EXTENSION} files, or the folder that holds them")
    splits: dict[str, dict[int, int]] = {}
    for file in files:
        piece = PIECE.match(file.name)
        pieces = splits.setdefault(piece[1] if piece else f"{file.parent.name}/", {})
        if piece:
            pieces[int(piece[2])] = int(piece[3])
    if len(splits) > 1:
        folder = sorted(splits)[0].endswith("/")
        example = str(files[0].parent) if folder else f"'{files[0].parent}/{sorted(splits)[0]}-*{EXTENSION}'"
        raise DataError(
            f"{printable(source)}: holds {', '.join(sorted(splits))}; name one of them, as in {printable(example)}"
        )
    ((split, pieces),) = splits.items()
    for number in range(max(pieces.values(), default=0)):
        if number not in pieces:
            total = max(pieces.values())
            raise DataError(f"{printable(source)}: piece {number} of {total} of {split} is missing; fetch all of them")
    return files


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{printable(file)}: reading Parquet needs pyarrow; pip install 'refiner_ds[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(file)}: not a whole Parquet file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _columns(file: Path, class_list: ClassList | None, label_column: str | None) -> Columns:
    """Which columns hold images and labels, by the metadata that Hugging Face writes, and by their types and names."""
    import pyarrow

    schema = _open(file).schema_arrow
    described = _described(schema)
    images = [name for name, kind in described.items() if kind.get("_type") == "Image"]
    if not images:
        images = [column.name for column in schema if _holds_images(column, pyarrow)]
    labels = [name for name, kind in described.items() if kind.get("_type") == "ClassLabel"]
    image = _choose(file, images, IMAGE_NAMES, "images", "name the column image")
    if label_column is not None and label_column not in schema.names:
        raise DataError(f"{printable(file)}: has no column {label_column}; there are {', '.join(schema.names)}")
    if not labels:
        labels = [column.name for column in schema if column.name in LABEL_NAMES]
    label = label_column or _choose(file, labels, LABEL_NAMES, "labels", "say which with --label-column")
    whole = pyarrow.types.is_integer(schema.field(label).type)
    if not whole and not _is_text(schema.field(label).type, pyarrow):
        raise DataError(f"{printable(file)}: column {label} is {schema.field(label).type}; labels are numbers or names")
    has_paths = pyarrow.types.is_struct(schema.field(image).type)
    if not whole:
        return Columns(image, label, None, has_paths)
    if class_list:
        return Columns(image, label, class_list.by_number or dict(enumerate(class_list.names)), has_paths)
    names = described.get(label, {}).get("names")
    if names and len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{printable(file)}: names class {twice} twice; give a list of different names with --classes")
    return Columns(image, label, dict(enumerate(names)) if names else None, has_paths)


def _described(schema: Any) -> dict[str, Any]:
    """What Hugging Face says of the columns, where it wrote the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _is_text(kind: Any, pyarrow: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _holds_images(column: Any, pyarrow: Any) -> bool:
    if pyarrow.types.is_struct(column.type):
        return column.type.get_field_index("bytes") >= 0
    binary = pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
    return bool(column.name in IMAGE_NAMES and binary)


def _choose(file: Path, found: list[str], usual: tuple[str, ...], what: str, advice: str) -> str:
    chosen = [name for name in found if name in usual] or found
    if len(chosen) != 1:
        which = f"columns {', '.join(found)} may all be" if found else "no column is known to be"
        raise DataError(f"{printable(file)}: {which} its {what}; {advice}")
    return chosen[0]


def _names_that_occur(files: list[Path], label: str) -> list[str]:
    """Class names where the files keep no list of them: the labels themselves."""
    found: set[str] = set()
    for file in files:
        try:
            column = _open(file).read(columns=[label]).column(label)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises a dozen kinds at damage
            raise DataError(f"{printable(file)}: cannot be read ({_first_line(error)}); fetch it again") from None
        found |= {str(value) for value in column.unique().to_pylist() if value is not None}
    return sort_classes(found)


def _parts(file: Path, columns: Columns, shard_bytes: int) -> Iterator[Rows]:
    """The row groups of a file; one that is larger than a shard in several parts."""
    opened = _open(file)
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        size = sum(
            group.column(place).total_uncompressed_size
            for place in range(group.num_columns)
            if group.column(place).path_in_schema.split(".")[0] == columns.image
        )
        pieces = max(1, min(-(-size // shard_bytes), group.num_rows))
        bounds = [group.num_rows * piece // pieces for piece in range(pieces + 1)]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            if end > start:
                yield Rows(file, number, start, end, size // pieces)


def _cut(parts: list[Rows], shard_bytes: int) -> list[list[Rows]]:
    """Parts in shards of about equal bytes, none of them empty."""
    total = sum(part.bytes for part in parts)
    count = max(1, -(-total // shard_bytes))
    shards: list[list[Rows]] = [[] for _ in range(count)]
    before = 0
    for part in parts:
        shards[min(count - 1, (before + part.bytes // 2) * count // max(1, total))].append(part)
        before += part.bytes
    return [shard for shard in shards if shard]
