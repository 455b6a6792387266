"""An index for WebDataset tars that exist already, so that they are used where they lie, without copying a byte.

    <folder>/imagenet1k-train-0000.tar …      <key>.jpg and <key>.cls or <key>.json, as timm and img2dataset write them
    <folder>/imagenet1k-train/index.json      written here: `ShardIndex.load` opens it like any set
    <folder>/imagenet1k-train/members.npy

A sample is what follows under one key. Its image is the member with an image's ending; its label is the number or the
name in ``.cls``, or ``label`` in ``.json``. Every byte is read once, for the checksums. Nothing here needs torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from refiner_ds.data.index import INDEX_NAME, Shard
from refiner_ds.data.tar_format import MEMBER, TarMember, checksum, read_members, split_name
from refiner_ds.data.writer import FinishedShard, cannot_write, write_index
from refiner_ds.errors import DataError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff", "avif", "jfif")
LABEL_ENDINGS = ("cls", "cls.txt")
TRAILING_NUMBER = re.compile(r"[-_.]?\d+\.tar$")
BRACES = re.compile(r"\{([^{}]*)\}")
GZIP = b"\x1f\x8b"
MOST_CLASSES = 1_000_000  # a larger number is no place in a list of classes, but an id

Label = int | str


@dataclass(frozen=True)
class TarScan:
    """What reading one tar found.

    Attributes:
        shard: its line of the index.
        members: [count] MEMBER records; the labels are those of ``labels`` where they are numbers.
        labels: [count] as they are written in the tar, numbers or names.
        names: class names that the file names in ``.json`` suggest for numbers, "" where they disagree.
        key_hashes: [count] uint64.
    """

    shard: Shard
    members: np.ndarray
    labels: list[Label]
    names: dict[int, str]
    key_hashes: np.ndarray


@dataclass(frozen=True)
class TarSet:
    """Tars that make one set: their folder, their names in order, and what the set is called."""

    folder: Path
    names: list[str]
    title: str

    @property
    def paths(self) -> list[Path]:
        """The tars, in order."""
        return [self.folder / name for name in self.names]


def find_tars(spec: str | Path) -> TarSet:
    """The tars that a folder or a pattern means.

    Args:
        spec: a folder of tars; or a path whose last part has ``{0000..1023}``, ``{a,b}``, ``*`` or ``?`` in it.
    Raises:
        DataError: there are none, one that the pattern counts is missing, or the folder holds tars of several sets.
    """
    path = Path(spec).expanduser()
    folder, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the tars")
    names: list[str] = []
    for name in _expanded(pattern):
        found = sorted(glob.glob(glob.escape(str(folder)) + "/" + name), key=_natural_order)
        if not found:
            raise DataError(f"{folder / name}: no such tar; correct the pattern, or copy the tar here")
        names += [os.path.basename(each) for each in found]
    if len(set(names)) != len(names):
        raise DataError(f"{spec}: names a tar twice; correct the pattern")
    titles = sorted({TRAILING_NUMBER.sub("", name).removesuffix(".tar") for name in names})
    if path.is_dir() and len(titles) > 1:
        raise DataError(
            f"{folder}: holds tars of several sets ({', '.join(titles[:4])}); name one, "
            f"{folder / titles[0]}-*.tar for example"
        )
    return TarSet(folder, names, titles[0] or folder.name)


def _expanded(pattern: str) -> Iterator[str]:
    """A pattern without its braces: {0000..1023} counts, {a,b} lists."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    low, dots, high = match[1].partition("..")
    if dots and low.isdigit() and high.isdigit():
        chosen = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    else:
        chosen = match[1].split(",")
    for each in chosen:
        yield from _expanded(pattern[: match.start()] + each + pattern[match.end() :])


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class _HashedFile:
    """A file that is read from beginning to end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data

    def finish(self) -> None:
        while self.read(1 << 20):
            pass


def scan_tar(path: Path, image: str | None = None) -> TarScan:
    """Read one tar: where its samples lie, their labels and checksums.

    Args:
        image: ending of the member that is the image, where samples have several; None: the one that there is.
    Raises:
        DataError: it cannot be read, is damaged or compressed, or a sample has no image or no label.
    """
    members: list[tuple[int, int, int, int, int]] = []
    labels: list[Label] = []
    keys: list[str] = []
    hashes: list[int] = []
    names: dict[int, str] = {}
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            if file.read(2) == GZIP:
                raise DataError(f"{path}: is compressed, so samples cannot be read one by one; gunzip it first")
            file.seek(0)
            hashed = _HashedFile(file)
            samples = groupby(read_members(hashed), lambda member: split_name(member.name)[0])  # type: ignore[arg-type]
            for key, parts in samples:
                if not key:
                    continue
                sample = _Sample.of(f"{path}: sample {len(keys)} ({key})", parts)
                picture = sample.image(image)
                label, name = sample.label()
                if isinstance(label, int) and name:
                    names[label] = name if names.get(label, name) == name else ""
                number = label if isinstance(label, int) else -1
                check = checksum(picture.header, picture.payload)
                members.append((picture.offset, len(picture.payload), 0, number, check))
                labels.append(label)
                hashes.append(xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")))
                keys.append(key)
            hashed.finish()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; copy the tar here again") from None
    keys_sha256 = hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()
    shard = Shard(path.name, len(keys), hashed.size, hashed.sha256.hexdigest(), keys_sha256)
    return TarScan(shard, np.array(members, dtype=MEMBER), labels, names, np.array(hashes, np.uint64))


@dataclass(frozen=True)
class _Sample:
    """The members of one sample by their endings."""

    location: str
    parts: dict[str, TarMember]

    @classmethod
    def of(cls, location: str, members: Iterable[TarMember]) -> _Sample:
        parts: dict[str, TarMember] = {}
        for member in members:
            ending = split_name(member.name)[1]
            if ending in parts:
                raise DataError(f"{location}: has .{ending} twice; keys must be unique in the whole set")
            parts[ending] = member
        return cls(location, parts)

    def image(self, wanted: str | None) -> TarMember:
        """The member that is the image."""
        found = [ending for ending in self.parts if ending.rpartition(".")[2] in IMAGE_ENDINGS]
        if wanted is not None:
            found = [ending for ending in found if ending == wanted]
        if len(found) > 1:
            raise DataError(f"{self.location}: has several images ({', '.join(found)}); say which ending is meant")
        if not found:
            kinds = f".{wanted}" if wanted else "image"
            raise DataError(f"{self.location}: has no {kinds} among {', '.join(sorted(self.parts))}")
        return self.parts[found[0]]

    def label(self) -> tuple[Label, str]:
        """The label, and the class name that the image's original file name suggests, or ""."""
        stored = self._json()
        written = next((self.parts[ending] for ending in LABEL_ENDINGS if ending in self.parts), None)
        if written is not None:
            try:
                label = _label(written.payload.decode().strip())
            except UnicodeDecodeError:
                raise DataError(f"{self.location}: its .cls is no text in UTF-8; write the label as such") from None
        elif isinstance(stored.get("label"), int | str):
            label = _label(str(stored["label"]).strip())
        else:
            raise DataError(f'{self.location}: has no label: neither .cls nor a "label" in .json')
        if isinstance(stored.get("label"), int | str) and _label(str(stored["label"]).strip()) != label:
            raise DataError(f"{self.location}: its .cls says {label} and its .json says {stored['label']}")
        if label == "" or (isinstance(label, int) and label < 0):
            raise DataError(f"{self.location}: its label is {label!r}; it must be a class name, or a number from 0")
        if isinstance(label, int) and label >= MOST_CLASSES:
            raise DataError(
                f"{self.location}: its label is {label}; numbers must be places in a list of classes, not ids"
            )
        folder = os.path.basename(os.path.dirname(str(stored.get("filename", ""))))
        return label, folder

    def _json(self) -> dict[str, Any]:
        if "json" not in self.parts:
            return {}
        try:
            stored = json.loads(self.parts["json"].payload)
        except ValueError:
            raise DataError(f"{self.location}: its .json is not JSON") from None
        return stored if isinstance(stored, dict) else {}


def _label(text: str) -> Label:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def index_existing(
    spec: str | Path,
    out: Path | None = None,
    classes: Sequence[str] | None = None,
    image: str | None = None,
    scan: Callable[[Callable[[Path], TarScan], list[Path]], Iterable[TarScan]] = map,
) -> Path:
    """Write the index of tars that exist already; returns the folder it is in, which `ShardIndex.load` opens.

    Args:
        spec: a folder or a pattern, see `find_tars`.
        out: folder of the index, on any disk; None: the folder itself, or for a pattern one named after it beside the
            tars.
        classes: class names in the order of the labels; None: the names in the tars, else those that the folders of
            the original files give, else the numbers themselves.
        image: as in `scan_tar`.
        scan: applies a function to every tar, in order: ``map``, or one that uses several processes and shows progress.
    Raises:
        DataError: the tars are no set, see `scan_tar`; a key comes twice; a label is no class; ``out`` holds a set
            already or cannot be written.
    """
    tars = find_tars(spec)
    if out is None:
        out = tars.folder if Path(spec).expanduser().is_dir() else tars.folder / tars.title
    if (out / INDEX_NAME).exists():
        raise DataError(f"{out / INDEX_NAME}: exists already; remove it to make it again, or choose another folder")
    _refuse_where_it_cannot_be_written(out)  # before hours of reading
    scans = list(scan(partial(scan_tar, image=image), tars.paths))
    _refuse_repeated_keys(scans)
    _refuse_numbers_among_names(scans, tars.folder)
    names = list(classes) if classes is not None else _class_names(scans)
    finished = [FinishedShard(one.shard, _labelled(one, names, tars.folder)) for one in scans]
    if not sum(one.shard.count for one in scans):
        raise DataError(f"{spec}: the tars hold no samples")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(cannot_write(out, error)) from None
    write_index(out, finished, names, tars=_path_from(out, tars.folder))
    return out


def _refuse_where_it_cannot_be_written(out: Path) -> None:
    there = out.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{out}: cannot be written, so the index has to go elsewhere; name another folder with --out")


def _refuse_repeated_keys(scans: Sequence[TarScan]) -> None:
    hashes = np.concatenate([one.key_hashes for one in scans]) if scans else np.zeros(0, np.uint64)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(again):
        return
    starts = np.cumsum([0, *(one.shard.count for one in scans)])
    places = []
    for sample in sorted(order[again[0] : again[0] + 2].tolist()):
        tar = int(starts.searchsorted(sample, "right")) - 1
        places.append(f"sample {sample - int(starts[tar])} of {scans[tar].shard.name}")
    raise DataError(f"{' and '.join(places)} have one key; keys must be unique in the whole set")


def _refuse_numbers_among_names(scans: Sequence[TarScan], folder: Path) -> None:
    """Whether 3 is a name too, or the fourth of the names, cannot be known."""
    seen: dict[bool, tuple[str, Label]] = {}
    for one in scans:
        for sample, label in enumerate(one.labels):
            seen.setdefault(isinstance(label, int), (f"{folder / one.shard.name}: sample {sample}", label))
    if len(seen) > 1:
        (place, name), (other, number) = seen[False], seen[True]
        raise DataError(f"{place} has the class name {name!r} and {other} the number {number}; use one or the other")


def _class_names(scans: Sequence[TarScan]) -> list[str]:
    """Class names as the tars themselves give them."""
    labels = {label for one in scans for label in one.labels}
    if all(isinstance(label, int) for label in labels):
        numbers = range(max(map(int, labels), default=-1) + 1)
        names: dict[int, set[str]] = {}
        for one in scans:
            for number, name in one.names.items():
                names.setdefault(number, set()).add(name)
        chosen = [next(iter(names.get(number, {""}))) for number in numbers]
        agreed = all(len(names.get(number, "")) == 1 for number in numbers) and len(set(chosen)) == len(numbers)
        return chosen if agreed and all(chosen) else [str(number) for number in numbers]
    return sorted(str(label) for label in labels)


def _labelled(one: TarScan, classes: list[str], folder: Path) -> np.ndarray:
    """A tar's MEMBER records with labels as positions in the class list."""
    number_of = {name: number for number, name in enumerate(classes)}
    members = one.members.copy()
    for sample, label in enumerate(one.labels):
        number = label if isinstance(label, int) else number_of.get(label, -1)
        if not 0 <= number < len(classes):
            raise DataError(
                f"{folder / one.shard.name}: sample {sample} has class {label}, none of the {len(classes)} in the list"
            )
        members[sample]["label"] = number
    return members


def _path_from(out: Path, folder: Path) -> str | None:
    """How ``index.json`` in ``out`` names the tars' folder: relative where one moves with the other."""
    out, folder = out.resolve(), folder.resolve()
    if out == folder:
        return None
    return os.path.relpath(folder, out) if out.is_relative_to(folder) else str(folder)
