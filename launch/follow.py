"""A job's log, shown as it grows, until the job ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


class Follower:
    """Writes what a file gains, from its beginning, to a stream."""

    def __init__(self, file: Path, out: TextIO) -> None:
        self.file, self._out, self._read = file, out, 0

    def show(self) -> None:
        """Write what is new; a file that is not there yet is empty."""
        try:
            with self.file.open("rb") as log:
                log.seek(self._read)
                new = log.read()
        except FileNotFoundError:
            return
        self._read += len(new)
        if new:
            self._out.write(new.decode(errors="replace"))
            self._out.flush()


def follow(log: Path, ended: Callable[[], bool], out: TextIO, every: float = 1.0) -> None:
    """Show ``log`` until ``ended``, asked every ``every`` to 5 × ``every`` seconds, says that the job has."""
    follower, pause, asked = Follower(log, out), every, time.monotonic()
    while True:
        follower.show()
        if time.monotonic() - asked >= pause:
            over = ended()
            asked, pause = time.monotonic(), min(pause * 1.5, 5 * every)
            if over:
                time.sleep(every)  # a shared file system shows a node's last lines a little later
                follower.show()
                return
        time.sleep(every / 4)
