"""From what a run file calls a set to the folder that holds it: a folder, an installed package, or an address."""

from __future__ import annotations

import os
from pathlib import Path

from refiner_ds.data.packaged import PREFIX, packaged_set
from refiner_ds.data.remote import fetch_set, is_remote


def default_cache() -> Path:
    """Folder for sets made or fetched: $REFINER_DS_CACHE, or ~/.cache/refiner_ds."""
    return Path(os.environ.get("REFINER_DS_CACHE") or Path.home() / ".cache" / "refiner_ds")


def locate(spec: str | Path, cache: str | Path | None = None) -> Path:
    """The folder of a shard set; one from a package is made, and one from an address begun, if it is not there yet.

    Args:
        spec: a folder, returned as it is, ``package:<name>/<part>``, or an address (see `remote`).
        cache: where sets made or fetched are kept; None: `default_cache`.
    Raises:
        DataError: no such packaged set, the package is not installed, the address leads to no set, or the cache cannot
            be written.
    """
    folder = Path(cache or default_cache()).expanduser()
    if is_remote(str(spec)):
        return fetch_set(str(spec), folder / "remote")
    if str(spec).startswith(PREFIX):
        return packaged_set(str(spec), folder)
    return Path(spec)
