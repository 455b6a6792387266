"""Writing a file so that nobody ever sees half of it, reading one that may be damaged, locks, and checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def is_full(error: OSError) -> bool:
    """Whether something could not be written for want of room: the disk, a quota, or the number of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no such file, or anything else in it."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else None
    return None


def read_objects(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; what is none, as a line that was cut short, is left out."""
    found = []
    with suppress(OSError):
        for line in file.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                if isinstance(one := json.loads(line), dict):
                    found.append(one)
    return found


def has_numbers(found: dict[str, Any], *keys: str) -> bool:
    """Whether each of some keys of a JSON object has a number."""
    return all(isinstance(found.get(key), int | float) for key in keys)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, in one write; begins a new line where the last was cut short."""
    with open(path, "ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())


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


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``<path>.lock``, waiting for whoever holds it; it is released when its process ends.

    Raises:
        OSError: the lock file cannot be made.
    """
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
