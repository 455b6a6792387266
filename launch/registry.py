"""Which run folders were submitted from here, for ``launch/jobs.py``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from refiner_ds.cache import cache_folder
from refiner_ds.run_folder import RunFolder

NAME = "submitted_runs"  # run folders, one a line, the newest last


def register(run_folder: RunFolder) -> None:
    """Remember a run folder; where that cannot be, its path finds it."""
    file = cache_folder() / NAME
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as registry:
            registry.write(f"{run_folder.path.absolute()}\n")


def registered() -> list[Path]:
    """Run folders that were submitted from here and still exist, newest first."""
    with suppress(OSError):
        lines = (cache_folder() / NAME).read_text().splitlines()
        folders = [Path(line) for line in dict.fromkeys(reversed(lines)) if line]
        return [folder for folder in folders if (folder / "jobs").is_dir()]
    return []
