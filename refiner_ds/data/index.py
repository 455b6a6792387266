"""What a shard set is: tars, a members table and an index, and the refusal of everything that is not one.

    <set>/
      shard-000000.tar …   WebDataset tars: <key>.jpg, then <key>.map where there are maps, else <key>.cls
      members.npy          one MEMBER record a sample, in the order of the tars; read through the page cache
      index.json           format, version, classes, and name, count, size and checksums of every shard

Existing WebDataset tars need no copy: their index (`webdataset_index`) may lie in another folder, whose ``index.json``
then says under ``tars`` where they are, from that folder or from the root.

The members table is mapped, not loaded: a rank's own memory does not grow with the number of samples. ``index.json`` is
written last, so a set without one is not a set. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.data.tar_format import MEMBER
from refiner_ds.errors import DataError

FORMAT = "refiner_ds shard set"
VERSION = 1
INDEX_NAME = "index.json"
MEMBERS_NAME = "members.npy"
MAPS_SUFFIX = ".maps"
MAX_HASHED_BYTES = 64 << 20  # bytes; a larger members table is left to data_tools/verify.py to keep start-up short


@dataclass(frozen=True)
class Shard:
    """One tar as the index knows it: file name, samples, size in bytes, sha256 of the file and of its keys in order."""

    name: str
    count: int
    bytes: int
    sha256: str
    keys_sha256: str


@dataclass(frozen=True)
class MapFormat:
    """What every score map of a set looks like: top ``k`` classes at each of ``rows`` × ``columns`` locations."""

    k: int
    rows: int
    columns: int


class ShardIndex:
    """A shard set, opened for reading.

    Attributes:
        folder: where the index lies.
        tars: folder of the tars; ``folder`` itself but for existing WebDataset tars that are indexed elsewhere.
        shards: its tars, in order.
        classes: class names; a label is a position in this list.
        maps: the format of its score maps, or None.
        members: [count] MEMBER records, mapped from disk.
        starts: [len(shards) + 1] number of the first sample of each shard.
        source: address that missing shards are fetched from (`remote.fetch_shard`), or None. It may hold a password:
            it is kept in memory alone, and printed only through `addresses.redacted`.
        label_map: [classes as stored] int64 from stored labels to positions in ``classes``, or None where they agree.
    """

    label_map: np.ndarray | None = None

    def __init__(
        self,
        folder: Path,
        shards: list[Shard],
        classes: list[str],
        maps: MapFormat | None,
        members: np.ndarray,
        tars: str = ".",
        source: str | None = None,
        members_sha256: str = "",
    ) -> None:
        self.folder = folder
        self.tars = folder / tars
        self.shards = shards
        self.classes = classes
        self.maps = maps
        self.members = members
        self.source = source
        self.members_sha256 = members_sha256
        self.starts = np.concatenate([[0], np.cumsum([shard.count for shard in shards], dtype=np.int64)])

    @classmethod
    def load(cls, folder: str | Path, check_files: bool = True, source: str | None = None) -> ShardIndex:
        """Open the set in ``folder``.

        Args:
            folder: holds ``index.json``, ``members.npy`` and the tars.
            check_files: also compare every tar's size with the index. Training leaves it to the first process of
                each node (`training.preparation.refuse_missing_files`).
            source: address that its shards are fetched from; see `locate.open_index`.
        Raises:
            DataError: there is no usable set; says what is wrong and what would be right.
        """
        folder = Path(folder)
        stored = _read_json(folder)
        try:
            shards = [Shard(**entry) for entry in stored["shards"]]
            classes = list(stored["classes"])
            maps = MapFormat(**stored["maps"]) if stored["maps"] else None
            tars = str(stored.get("tars", "."))
            members_sha256 = stored["members_sha256"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / INDEX_NAME}: not a complete index ({error}); make the set again") from None
        members = _map_members(folder / MEMBERS_NAME, sum(shard.count for shard in shards), members_sha256)
        index = cls(folder, shards, classes, maps, members, tars, source, members_sha256)
        if check_files:
            for sentence in index.file_errors():
                raise DataError(sentence)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker as a folder name: the other side maps the same table."""
        return _reopen, (self.folder, self.source, self.classes, self.label_map)

    def with_classes(self, classes: list[str], labels: np.ndarray) -> ShardIndex:
        """The same set with another class list, a run's; ``labels`` says where in it each class of this set is."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, classes=list(classes), label_map=labels)
        return other

    def label(self, stored: int) -> int:
        """The position in ``classes`` that a stored label means."""
        return stored if self.label_map is None else int(self.label_map[stored])

    @property
    def count(self) -> int:
        """Samples in the set."""
        return int(self.starts[-1])

    @property
    def content_sha256(self) -> str:
        """What the set holds, wherever it lies: its classes, and its samples, labels and their order."""
        shards = [(shard.count, shard.bytes, shard.sha256, shard.keys_sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.classes, self.members_sha256, shards]).encode()).hexdigest()

    @property
    def has_maps(self) -> bool:
        """Whether score maps lie beside the images."""
        return self.maps is not None

    @property
    def is_maps_only(self) -> bool:
        """Whether this is a set of maps: score maps without their images, joined to another set by its keys."""
        return self.has_maps and not self.members["map_bytes"][:1].any()

    def map_format_for(self, images: ShardIndex) -> MapFormat:
        """The format of this set's maps, for use with the images of ``images`` (which may be this set).

        Raises:
            DataError: there are no maps here, or they are those of other images.
        """
        if self.maps is None:
            raise DataError(
                f"{self.folder}: no score maps; make some with data_tools/annotate.py, or train on labels alone"
            )
        if self is not images and [(s.count, s.keys_sha256) for s in self.shards] != [
            (s.count, s.keys_sha256) for s in images.shards
        ]:
            raise DataError(f"{self.folder}: its maps are not those of {images.folder}; annotate that set again")
        return self.maps

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds sample number ``sample``."""
        return int(self.starts.searchsorted(sample, "right")) - 1

    def shard_path(self, number: int) -> Path:
        """Where shard ``number`` lies, or will lie once it is fetched."""
        return self.tars / self.shards[number].name

    def file_errors(self) -> list[str]:
        """One sentence for every tar that is missing or not as long as the index says."""
        errors = []
        for number, shard in enumerate(self.shards):
            path = self.shard_path(number)
            try:
                found = path.stat().st_size
            except OSError:
                if self.source is not None:
                    continue  # comes when it is wanted
                errors.append(f"{path}: named by {INDEX_NAME} but missing; copy it here again or make the set again")
                continue
            if found != shard.bytes:
                errors.append(
                    f"{path}: {found} bytes where {INDEX_NAME} says {shard.bytes}; "
                    "it was cut, or the index belongs to another set"
                )
        return errors

    def describe(self) -> str:
        """The set in one line, for logs."""
        total = sum(shard.bytes for shard in self.shards)
        maps = f"{self.maps.rows}×{self.maps.columns} top-{self.maps.k} score maps" if self.maps else "no score maps"
        shards = f"{len(self.shards)} shard{'s' * (len(self.shards) != 1)}"
        return (
            f"{self.folder}: {self.count:,} samples, {len(self.classes)} classes, {shards}, "
            f"{total / 2**20:,.1f} MiB, {maps}"
        )


def _reopen(folder: Path, source: str | None, classes: list[str], label_map: np.ndarray | None) -> ShardIndex:
    index = ShardIndex.load(folder, check_files=False, source=source)
    return index if label_map is None else index.with_classes(classes, label_map)


def maps_folder(images: Path) -> Path:
    """Where the score maps of a set lie that has none itself: a set of maps alone, joined by its keys."""
    return images.with_name(images.name + MAPS_SUFFIX)


def find_maps(images: ShardIndex, elsewhere: ShardIndex | None = None, check_files: bool = True) -> ShardIndex:
    """The set that holds the score maps of ``images``: the one given, itself, or ``<folder>.maps`` beside it.

    Args:
        elsewhere: a set of maps, or of images and maps, on another disk or server.
        check_files: as in `ShardIndex.load`.
    Raises:
        DataError: there is neither, or the set of maps belongs to other images.
    """
    beside = maps_folder(images.folder)
    if elsewhere is not None:
        maps = elsewhere
    elif images.has_maps or not beside.exists():
        maps = images
    else:
        maps = ShardIndex.load(beside, check_files)
    maps.map_format_for(images)
    return maps


def _read_json(folder: Path) -> dict[str, Any]:
    """``index.json`` as a dictionary of the right format and version."""
    path = folder / INDEX_NAME
    try:
        stored = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing_index(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{path}: not JSON; the set is damaged, make it again with data_tools/shard.py") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise DataError(f"{path}: not the index of a shard set; make one with data_tools/shard.py")
    if stored.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {stored.get('version')}; this release reads version {VERSION}, "
            "make the set again with data_tools/shard.py"
        )
    return stored


def _missing_index(folder: Path) -> str:
    """The most helpful thing to say about a folder without an index."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        if partial.is_dir():
            return f"{folder}: not finished, {partial.name} is there; run the same data_tools/shard.py command again"
        return f"{folder}: no such folder; make a shard set there with data_tools/shard.py"
    if not folder.is_dir():
        return f"{folder}: a file, where the folder of a shard set is wanted"
    entries = sorted(folder.iterdir())
    if not entries:
        return f"{folder}: empty; make a shard set with data_tools/shard.py"
    tars = sum(entry.suffix == ".tar" for entry in entries)
    if tars:
        return f"{folder}: {tars} tar files but no {INDEX_NAME}; make the set again with data_tools/shard.py"
    if any((entry / INDEX_NAME).is_file() for entry in entries if entry.is_dir()):
        inside = next(entry for entry in entries if (entry / INDEX_NAME).is_file())
        return f"{folder}: no shard set, but {inside} is one; name that folder"
    if any(entry.is_dir() for entry in entries):
        return f"{folder}: folders but no {INDEX_NAME}; turn class folders into shards with data_tools/shard.py"
    return f"{folder}: no {INDEX_NAME}; make a shard set with data_tools/shard.py"


def _map_members(path: Path, count: int, sha256: str) -> np.ndarray:
    """The members table, mapped read-only and checked against the index."""
    try:
        members = np.load(path, mmap_mode="r" if count else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: missing beside {INDEX_NAME}; copy it here again or make the set again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a members table ({error}); copy it here again or make the set again") from None
    if members.dtype != MEMBER or members.shape != (count,):
        raise DataError(f"{path}: {members.shape[0]} records where {INDEX_NAME} counts {count}; of another set")
    if path.stat().st_size <= MAX_HASHED_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise DataError(f"{path}: not the table that {INDEX_NAME} was written with; it is damaged or of another set")
    return members
