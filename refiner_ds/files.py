"""Writing a file so that nobody ever sees half of it, and the checksum that files are listed with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, data: str | bytes, *, writer: str = "") -> None:
    """Write or replace a small file in one step: a reader sees what was there before, or all of ``data``.

    Args:
        path: its folder exists.
        writer: a name for whoever writes, where several may write the same file at the same moment.
    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    temporary = path.with_name(f"{path.name}{writer and f'.{writer}'}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut, as fsync of a file does for its bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
