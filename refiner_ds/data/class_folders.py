"""Class folders that are read as they lie: listed on first use, into the cache, and not copied.

    <root>/<class>/…/<image>.jpg          what a person has
    <cache>/folders/<hash of the root>/   what is kept of it
      index.json                          root, classes, images and bytes of each, when each folder was last changed
      <hash of the list>.npy              one FILE record an image, class by class, sorted by path
      <hash of the list>.names            their paths relative to the root, one after the other
      notes.txt                           files that were not taken, and why; only where there are any

Folders that were changed since are listed again: a file that is added, removed or renamed changes its folder's time. So
are trees in which a link leads somewhere that led nowhere. A file that was overwritten is found by its size when it is
read. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.data.image_tree import LabelledImages, printable, read_class_folders
from refiner_ds.data.index import INDEX_NAME, Shard, ShardIndex
from refiner_ds.data.writer import cannot_write, locked, write_whole
from refiner_ds.errors import DataError

FORMAT = "refiner_ds class folders"
VERSION = 3
NOTES_NAME = "notes.txt"
SECONDS_BETWEEN_LINES = 5.0

FILE = np.dtype([("name_start", "<u8"), ("name_bytes", "<u4"), ("image_bytes", "<u8"), ("label", "<i4")])


class ClassFolders(ShardIndex):
    """Class folders as a set of images: each class stands where a shard does.

    Attributes:
        kept: folder in the cache that holds the list.
        names: every path relative to ``folder``, joined, mapped from disk.
    """

    def __init__(self, root: Path, kept: Path, stored: dict[str, Any]) -> None:
        files, names = _files_of(kept, stored["files_sha256"])
        members = np.load(files, mmap_mode="r" if stored["count"] else None, allow_pickle=False)
        shards = [Shard(**entry) for entry in stored["shards"]]
        super().__init__(root, shards, list(stored["classes"]), None, members, members_sha256=stored["files_sha256"])
        self.kept = kept
        self.names = np.memmap(names, np.uint8, "r")
        self._stored = {key: value for key, value in stored.items() if key != "folders"}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker by name: the other side maps the same list, though another was made meanwhile."""
        return _reopen, (self.folder, self.kept, self._stored, self.classes, self.label_map)

    def path_of(self, sample: int) -> str:
        """The path of an image, relative to the root."""
        start, size = int(self.members[sample]["name_start"]), int(self.members[sample]["name_bytes"])
        return os.fsdecode(self.names[start : start + size].tobytes())

    def file_errors(self) -> list[str]:
        """None: files were looked at when they were listed, and are again when they are read."""
        return []

    def describe(self) -> str:
        """The set in one line, for logs."""
        size = sum(shard.bytes for shard in self.shards) / 2**20
        return f"{self.folder}: {self.count:,} images in {len(self.classes):,} class folders, {size:,.1f} MiB"


def _reopen(
    root: Path, kept: Path, stored: dict[str, Any], classes: list[str], label_map: np.ndarray | None
) -> ShardIndex:
    index = ClassFolders(root, kept, stored)
    return index if label_map is None else index.with_classes(classes, label_map)


def _files_of(kept: Path, sha256: str) -> tuple[Path, Path]:
    """Records and paths of a list. Files of another list have other names, so that who uses one keeps it."""
    return kept / f"{sha256[:24]}.npy", kept / f"{sha256[:24]}.names"


def are_class_folders(folder: Path) -> bool:
    """Whether a folder looks like class folders: it holds folders, and neither an index nor tars nor a set inside."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return False
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return (
        bool(folders)
        and not any(entry.name == INDEX_NAME or entry.name.endswith(".tar") for entry in entries)
        and not any(os.path.exists(os.path.join(entry.path, INDEX_NAME)) for entry in folders)
        and not os.path.isdir(f"{folder}.partial")
    )


def open_class_folders(root: Path, cache: Path) -> ClassFolders:
    """Open class folders, listing them first where that was not done or something changed since.

    Args:
        root: holds a folder of images for every class.
        cache: folder that holds all such lists. Processes that ask at once wait for the one that lists.
    Raises:
        DataError: they are no class folders (`read_class_folders`), or the cache cannot be written.
    """
    root = root.absolute()
    kept = cache / hashlib.sha256(os.fsencode(root)).hexdigest()[:24]
    if (stored := _up_to_date(root, kept)) is None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(cannot_write(kept, error)) from None
        with locked(kept / INDEX_NAME):
            stored = _up_to_date(root, kept) or _list(root, kept)
    return ClassFolders(root, kept, stored)


def _up_to_date(root: Path, kept: Path) -> dict[str, Any] | None:
    """What is kept of the folders; None where there is nothing, or something else by now."""
    try:
        stored = json.loads((kept / INDEX_NAME).read_bytes())
        if stored["format"] != FORMAT or stored["version"] != VERSION or stored["root"] != printable(root):
            return None
        there = all(path.is_file() for path in _files_of(kept, stored["files_sha256"]))
        unchanged = there and all(_changed(root / path) == changed for path, changed in stored["folders"].items())
        return dict(stored) if unchanged else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _list(root: Path, kept: Path) -> dict[str, Any]:
    began = time.monotonic()
    found = read_class_folders(root, _progress(root))
    paths = [os.fsencode(image.path) for image in found.images]
    files = np.zeros(len(paths), FILE)
    sizes = np.array([len(path) for path in paths], np.uint64)
    files["name_bytes"] = sizes
    files["name_start"] = np.cumsum(sizes) - sizes
    files["image_bytes"] = [image.size for image in found.images]
    files["label"] = [image.label for image in found.images]
    buffer = io.BytesIO()
    np.save(buffer, files, allow_pickle=False)
    table, names = buffer.getvalue(), b"".join(paths)
    sha256 = hashlib.sha256(table + names).hexdigest()
    for path, data in zip(_files_of(kept, sha256), (table, names), strict=True):
        write_whole(path, data)
    (kept / NOTES_NAME).unlink(missing_ok=True)
    if found.ignored:
        write_whole(kept / NOTES_NAME, ("\n".join(found.ignored) + "\n").encode())
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "root": printable(root),
        "count": len(paths),
        "files_sha256": sha256,
        "classes": found.classes,
        "shards": _classes_as_shards(found, files),
        "folders": {path: _changed(root / path) for path in sorted(found.looked_at)},
    }
    write_whole(kept / INDEX_NAME, json.dumps(stored).encode())
    seconds = time.monotonic() - began
    left = f"; {len(found.ignored)} files not taken, see {kept / NOTES_NAME}" if found.ignored else ""
    _print(f"listed {printable(root)}: {len(paths):,} images in {len(found.classes):,} classes, {seconds:.0f} s{left}")
    return stored


def _classes_as_shards(found: LabelledImages, files: np.ndarray) -> list[dict[str, Any]]:
    edges = np.searchsorted(files["label"], np.arange(len(found.classes) + 1))
    return [
        {
            "name": name,
            "count": int(end - start),
            "bytes": int(files["image_bytes"][start:end].sum()),
            "sha256": "",
            "keys_sha256": hashlib.sha256(
                b"\n".join(os.fsencode(image.path) for image in found.images[start:end])
            ).hexdigest(),
        }
        for name, start, end in zip(found.classes, edges[:-1], edges[1:], strict=True)
    ]


def _changed(path: Path) -> int | None:
    """When a folder was last changed; None for what cannot be opened: a link to a disk that is not there, say."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _progress(root: Path) -> Callable[[int, int, int], None]:
    """Prints how far the listing of a large tree has come, a line every few seconds."""
    last = time.monotonic()

    def show(classes: int, of: int, images: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            _print(f"listing {printable(root)}: {classes:,} of {of:,} classes, {images:,} images")

    return show


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
