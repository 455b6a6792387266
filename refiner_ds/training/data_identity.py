"""Which data a run was begun with, by what is in it: the same set at another place is the same set.

    <run folder>/data.json    {"train": {"place": …, "images": …, "content_sha256": …}, "maps": … or null}
    <checkpoint>/data.json    the same

A copy on a node's own disk or a new presigned address continues a run; a set that has changed, at whatever place, would
be another order of other samples and is refused.
"""

from __future__ import annotations

import json
from typing import Any

from refiner_ds.config import RunFile
from refiner_ds.config.addresses import redacted
from refiner_ds.data.index import ShardIndex
from refiner_ds.errors import ConfigError, DataError
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder


def refuse_other_data(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> None:
    """Raise DataError where the run folder holds a run on other data.

    A damaged ``data.json`` is written again by `record_data`, once the copy of the newest checkpoint has been compared.

    Raises:
        ConfigError: it is damaged, and no checkpoint of the run has a copy.
    """
    folder = RunFolder(run.folder)
    wanted = folder.trained_on()
    if wanted is None:
        if folder.data.exists() and folder.saved_checkpoints():  # without one the run begins anew, on any data
            raise ConfigError(
                f"{folder.data}: is damaged, and no checkpoint has a copy of it, so the data cannot be compared with"
                " that of the run; restore it from a backup, or choose another refiner.run.name to begin a new run"
            )
        return
    for name, now in described(run, train, maps).items():
        old = wanted.get(name)
        if (old or {}).get("content_sha256") != (now or {}).get("content_sha256"):
            raise DataError(
                f"{run.folder}: holds a run on {_words(name, old)}, and refiner.data now means {_words(name, now)};"
                " give the same data, or choose another refiner.run.name to begin a new run"
            )


def record_data(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> None:
    """Write ``data.json``."""
    write_atomically(RunFolder(run.folder).data, json.dumps(described(run, train, maps), indent=2) + "\n")


def described(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> dict[str, Any]:
    """What ``data.json`` holds."""
    place = redacted(run.refiner.data.train)
    return {
        "train": {"place": place, "images": train.count, "content_sha256": train.content_sha256},
        "maps": None if maps is None else {"place": str(maps.folder), "content_sha256": maps.content_sha256},
    }


def _words(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "no score maps"
    if name == "maps":
        return f"the score maps {found['place']} (content {found['content_sha256'][:8]})"
    return f"{found['place']}: {found.get('images')} images (content {found['content_sha256'][:8]})"
