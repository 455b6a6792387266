"""Opens what a run file calls a set: a folder of shards, class folders, a package's set, or an address."""

from __future__ import annotations

from pathlib import Path

from refiner_ds.cache import cache_folder
from refiner_ds.config.addresses import is_address
from refiner_ds.data.class_folders import are_class_folders, open_class_folders
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.packaged import PREFIX, packaged_set
from refiner_ds.data.remote import fetch_set


def open_index(
    spec: str | Path, cache: str | Path | None = None, check_files: bool = True, class_folders: bool = True
) -> ShardIndex:
    """Open a set; one from a package is made, and one from an address begun, if it is not there yet.

    Args:
        spec: a folder, ``package:<name>/<part>``, or an address (see `remote`).
        cache: where sets made or fetched are kept; None: as `cache_folder` says.
        check_files: as in `ShardIndex.load`.
        class_folders: take class folders as well; they are listed on first use.
    Raises:
        DataError: there is no such set or none at the address, the package is not installed, or the cache cannot be
            written.
    """
    name, kept = str(spec), cache_folder(cache)
    if is_address(name):
        return ShardIndex.load(fetch_set(name, kept / "remote"), check_files, source=name)
    if name.startswith(PREFIX):
        return ShardIndex.load(packaged_set(name, kept), check_files)
    if class_folders and are_class_folders(Path(spec)):
        return open_class_folders(Path(spec), kept / "folders")
    return ShardIndex.load(spec, check_files)
