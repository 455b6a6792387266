"""The folder of what can be made again: sets made or fetched, times that were measured, checks that were passed."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(chosen: str | Path | None = None) -> Path:
    """``chosen``, as ``refiner.data.cache`` may say; else $REFINER_DS_CACHE, or ~/.cache/refiner_ds."""
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("REFINER_DS_CACHE") or Path.home() / ".cache" / "refiner_ds")
