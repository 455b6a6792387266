"""Writes shard sets: the same samples give the same bytes, and a set is complete or not there.

    <set>.partial/            while it is being made
      shard-000000.tar.tmp    a shard being written: fsync, then renamed to shard-000000.tar
    <set>/                    the partial folder, renamed once index.json is in it

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from refiner_ds.data.index import FORMAT, INDEX_NAME, MEMBERS_NAME, VERSION, MapFormat, Shard
from refiner_ds.data.tar_format import END_OF_TAR, MEMBER, checksum, tar_member
from refiner_ds.errors import DataError
from refiner_ds.files import exclusive_lock, fsync_folder, is_full, write_atomically


def shard_name(number: int) -> str:
    """File name of the ``number``-th shard of a set."""
    return f"shard-{number:06d}.tar"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent, as it was, or complete.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise DataError(cannot_write(path, error)) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to ``path``, waiting for whoever holds it.

    Raises:
        DataError: its folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(path))
        except OSError as error:
            raise DataError(cannot_write(path, error)) from None
        yield


def cannot_write(path: Path, error: OSError) -> str:
    """The sentence for a failed write."""
    if is_full(error):
        return f"{path}: no room left on its disk; free some or choose another folder"
    return f"{path}: cannot be written ({error.strerror}); choose a folder that can"


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk: its line of the index and its MEMBER records."""

    shard: Shard
    members: np.ndarray


class ShardWriter:
    """One tar, written under a temporary name until `finish`.

    Args:
        path: the tar's final path; its folder exists.
    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        try:
            self._file = open(self._temporary, "wb", buffering=1 << 20)
        except OSError as error:
            raise DataError(cannot_write(path, error)) from None
        self._sha256 = hashlib.sha256()
        self._keys: list[str] = []
        self._members: list[tuple[int, int, int, int, int]] = []
        self._offset = 0

    @property
    def count(self) -> int:
        """Samples so far."""
        return len(self._keys)

    def add(self, key: str, image: bytes, ending: str, label: int, score_map: bytes | None = None) -> None:
        """Append one sample.

        Args:
            key: unique in the whole set, ASCII without a dot.
            image: the image file's bytes, kept as they are.
            ending: "jpg" or "png".
            label: position in the set's class list.
            score_map: a map record (`score_maps.encode`); without one the label gets a ``.cls`` member of its own.
        Raises:
            DataError: the disk is full.
            ValueError: the key does not fit a tar header.
        """
        parts = tar_member(f"{key}.{ending}", image)
        if score_map is None:
            self._append(key, len(image), 0, label, parts, tar_member(f"{key}.cls", b"%d" % label))
        else:
            self._append(key, len(image), len(score_map), label, parts + tar_member(f"{key}.map", score_map))

    def add_map(self, key: str, score_map: bytes, label: int) -> None:
        """Append the map of a sample whose image lies under the same key in another set (a set of maps)."""
        self._append(key, len(score_map), 0, label, tar_member(f"{key}.map", score_map))

    def _append(
        self, key: str, first_bytes: int, map_bytes: int, label: int, span: list[bytes], beyond: Sequence[bytes] = ()
    ) -> None:
        """Record a sample and write it: the parts its check covers, all but the last padding, and those beyond."""
        self._members.append((self._offset, first_bytes, map_bytes, label, checksum(*span[:-1])))
        self._keys.append(key)
        self._write([*span, *beyond])

    def _write(self, parts: Sequence[bytes]) -> None:
        for part in parts:
            self._sha256.update(part)
            self._offset += len(part)
        try:
            self._file.writelines(parts)
        except OSError as error:
            raise DataError(cannot_write(self.path, error)) from None

    def finish(self) -> FinishedShard:
        """End the tar, make it durable and give it its name.

        Raises:
            DataError: the disk is full.
        """
        self._write([END_OF_TAR])
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise DataError(cannot_write(self.path, error)) from None
        keys_sha256 = hashlib.sha256("\n".join(self._keys).encode()).hexdigest()
        shard = Shard(self.path.name, len(self._keys), self._offset, self._sha256.hexdigest(), keys_sha256)
        return FinishedShard(shard, np.array(self._members, dtype=MEMBER))

    def abandon(self) -> None:
        """Drop the tar: nothing of it stays on disk."""
        try:
            self._file.close()
        except OSError:
            pass  # a full disk fails the last flush too, and the file goes anyway
        self._temporary.unlink(missing_ok=True)


def write_index(
    folder: Path,
    shards: Sequence[FinishedShard],
    classes: Sequence[str],
    maps: MapFormat | None = None,
    tars: str | None = None,
) -> None:
    """Write the members table and, last, the index that makes the tars in ``folder`` a set.

    Args:
        tars: the folder of the tars, where it is not ``folder``: absolute, or relative to ``folder``.
    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    members = np.concatenate([finished.members for finished in shards]) if shards else np.zeros(0, MEMBER)
    buffer = io.BytesIO()
    np.save(buffer, members, allow_pickle=False)
    table = buffer.getvalue()
    write_whole(folder / MEMBERS_NAME, table)
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "count": len(members),
        "maps": asdict(maps) if maps else None,
        "members_sha256": hashlib.sha256(table).hexdigest(),
        "classes": list(classes),
        **({"tars": tars} if tars else {}),
        "shards": [asdict(finished.shard) for finished in shards],
    }
    write_whole(folder / INDEX_NAME, (json.dumps(stored, indent=1) + "\n").encode())
    fsync_folder(folder)


class SetWriter:
    """A whole set, written sample after sample by one process; the folder appears when the ``with`` block ends well.

    Args:
        folder: the set's final folder; must not exist yet.
        classes: class names in the order of the labels.
        per_shard: samples a tar.
        maps: the format of the score maps, where samples have them.
    Raises:
        DataError: the folder exists, or cannot be written.
    """

    def __init__(self, folder: Path, classes: Sequence[str], per_shard: int, maps: MapFormat | None = None) -> None:
        self.folder = folder
        self._partial = folder.with_name(folder.name + ".partial")
        self._classes = classes
        self._per_shard = per_shard
        self._maps = maps
        self._finished: list[FinishedShard] = []
        self._current: ShardWriter | None = None
        if folder.exists():
            raise DataError(f"{folder}: already exists; choose another folder or remove it")
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(cannot_write(self._partial, error)) from None

    def add(self, key: str, image: bytes, ending: str, label: int, score_map: bytes | None = None) -> None:
        """Append one sample; arguments as in `ShardWriter.add`."""
        self._shard().add(key, image, ending, label, score_map)

    def add_map(self, key: str, score_map: bytes, label: int) -> None:
        """Append a map without its image; arguments as in `ShardWriter.add_map`."""
        self._shard().add_map(key, score_map, label)

    def _shard(self) -> ShardWriter:
        """The shard that takes the next sample."""
        if self._current is not None and self._current.count == self._per_shard:
            self._finish_shard()
        if self._current is None:
            self._current = ShardWriter(self._partial / shard_name(len(self._finished)))
        return self._current

    def _finish_shard(self) -> None:
        if self._current is not None:
            self._finished.append(self._current.finish())
            self._current = None

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._current is not None:
                self._current.abandon()
            return
        self._finish_shard()
        write_index(self._partial, self._finished, self._classes, self._maps)
        publish(self._partial, self.folder)


def publish(partial: Path, folder: Path) -> None:
    """Give a finished set its name, in one step.

    Raises:
        DataError: something else took the name meanwhile.
    """
    try:
        os.rename(partial, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise DataError(f"{folder}: the finished set stays in {partial} ({error.strerror})") from None
