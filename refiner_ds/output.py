"""Standard output that may go away: a terminal that hangs up, a launcher that dies with the pipe, ``| head``.

The run goes on, or saves and leaves; what it prints is in ``logs/rank_N.log`` as well. A log on a full disk loses
lines, and has those that come once there is room again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from refiner_ds.files import is_full


class LastingStream:
    """A text stream whose writes never fail: what nobody can read goes nowhere, and what finds no room is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose what cannot be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what cannot be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def end(self) -> None:
        """Flush for the last time."""
        try:
            self._stream.flush()
        except OSError:
            self._switch_to_devnull()

    def _lose(self, error: OSError) -> None:
        if not is_full(error):
            self._switch_to_devnull()

    def _switch_to_devnull(self) -> None:
        # What is still buffered would fail again when Python exits, and turn the exit code into 120.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let standard output and standard error outlast whoever reads them while the block runs."""
    before = sys.stdout, sys.stderr
    lasting = LastingStream(before[0]), LastingStream(before[1])
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.end()
        sys.stdout, sys.stderr = before
