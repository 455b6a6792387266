"""Which data a run was begun with, by what is in it: the same set at another place is the same set.

    <run folder>/data.json    {"train": {"place": …, "images": …, "content_sha256": …}, "maps": … or null}

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
from refiner_ds.files import read_object, write_atomically
from refiner_ds.run_folder import RunFolder


def refuse_other_data(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> None:
    """Raise DataError where the run folder holds a run on other data, ConfigError where ``data.json`` is damaged."""
    file = RunFolder(run.folder).data
    if not file.exists():
        return
    wanted = read_object(file) or {}
    if not _is_set(wanted.get("train")) or not (wanted.get("maps") is None or _is_set(wanted["maps"])):
        raise ConfigError(
            f"{file}: is damaged, so the data cannot be compared with that of the run; restore it from a backup,"
            " or choose another refiner.run.name to begin a new run"
        )
    for name, now in _described(run, train, maps).items():
        old = wanted.get(name)
        if (old or {}).get("content_sha256") != (now or {}).get("content_sha256"):
            raise DataError(
                f"{run.folder}: holds a run on {_words(name, old)}, and refiner.data now means {_words(name, now)};"
                " give the same data, or choose another refiner.run.name to begin a new run"
            )


def record_data(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> None:
    """Write ``data.json``."""
    described = json.dumps(_described(run, train, maps), indent=2)
    write_atomically(RunFolder(run.folder).data, described + "\n")


def _described(run: RunFile, train: ShardIndex, maps: ShardIndex | None) -> dict[str, Any]:
    place = redacted(run.refiner.data.train)
    return {
        "train": {"place": place, "images": train.count, "content_sha256": train.content_sha256},
        "maps": None if maps is None else {"place": str(maps.folder), "content_sha256": maps.content_sha256},
    }


def _is_set(described: Any) -> bool:
    return isinstance(described, dict) and all(
        isinstance(described.get(key), str) for key in ("place", "content_sha256")
    )


def _words(name: str, described: dict[str, Any] | None) -> str:
    if described is None:
        return "no score maps"
    if name == "maps":
        return f"the score maps {described['place']} (content {described['content_sha256'][:8]})"
    return f"{described['place']}: {described.get('images')} images (content {described['content_sha256'][:8]})"
