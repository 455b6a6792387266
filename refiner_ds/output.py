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
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what cannot be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Let what is still buffered go nowhere, and all that follows, too, unless it is only room that is wanting."""
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            before, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            self._stream.flush()  # it would fail again when Python exits, and turn the exit code into 120
            if is_full(error):
                os.dup2(before, number)
            os.close(before)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputError(OSError):
    """Standard output cannot be written; what it still held is lost."""


class ReportStream(LastingStream):
    """A text stream whose failures can be told from those of other files: a report that is cut off is no report."""

    def write(self, text: str) -> int:
        """Write. Raises OutputError."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._failure(error) from None

    def flush(self) -> None:
        """Flush. Raises OutputError."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> OutputError:
        self.lose(error)
        return OutputError(error.errno, error.strerror)


@contextmanager
def reporting_output() -> Iterator[None]:
    """Let what cannot be printed to standard output raise OutputError, at the end of the block at the latest."""
    before, stream = sys.stdout, ReportStream(sys.stdout)
    sys.stdout = stream
    try:
        yield
        stream.flush()
    except SystemExit:  # argparse, after --help
        stream.flush()
        raise
    finally:
        sys.stdout = before


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
            stream.flush()
        sys.stdout, sys.stderr = before
