"""Run files and tables: those that come with the package, and reading what a user names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refiner_ds.errors import ConfigError

__all__ = ["RUN_FILES", "or_shipped", "read_given"]

_PACKAGE = Path(__file__).resolve().parent
# An installed package holds the run files that a clone has beside it.
RUN_FILES = next(at for at in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if at.is_dir())


def or_shipped(file: Path, given: Path) -> Path:
    """``file``, or where it does not exist and was given as ``ds_configs/…`` the package's own of that name."""
    shipped = RUN_FILES / given.relative_to("ds_configs") if given.parts[:1] == ("ds_configs",) else file
    return shipped if not file.exists() and shipped.exists() else file


def read_given(file: Path, kind: str) -> Any:
    """What a JSON file holds that a user named.

    Args:
        kind: what it should be, for the sentence of a refusal: "table", "run file".
    Raises:
        ConfigError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such {kind}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as a {kind}: {error}") from None
