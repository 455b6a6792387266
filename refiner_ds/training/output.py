"""Standard output that may go away: a terminal that hangs up, a launcher that dies with the pipe, ``| head``.

The run goes on, or saves and leaves; what it prints is in ``logs/rank_N.log`` as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LastingStream:
    """A text stream whose writes never fail: once they would, they go nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose what cannot be written."""
        try:
            return self._stream.write(text)
        except OSError:
            self._switch_to_devnull()
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what cannot be written."""
        try:
            self._stream.flush()
        except OSError:
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
    sys.stdout, sys.stderr = LastingStream(before[0]), LastingStream(before[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
