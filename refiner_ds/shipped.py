"""The run files that come with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["RUN_FILES", "or_shipped"]

_PACKAGE = Path(__file__).resolve().parent
# An installed package holds the run files that a clone has beside it.
RUN_FILES = next(at for at in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if at.is_dir())


def or_shipped(file: Path, given: Path) -> Path:
    """``file``, or where it does not exist and was given as ``ds_configs/…`` the package's own of that name."""
    shipped = RUN_FILES / given.relative_to("ds_configs") if given.parts[:1] == ("ds_configs",) else file
    return shipped if not file.exists() and shipped.exists() else file
