"""What a person sees while a run goes on: one progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import time

log = logging.getLogger("refiner_ds")


class Console:
    """Prints for the main process; prints nothing on the others.

    Args:
        prints: whether this process is the one that prints.
        total_steps: optimizer steps of the whole run, for the time left.
    """

    def __init__(self, prints: bool, total_steps: int = 0) -> None:
        self._prints = prints
        self._total = total_steps
        self._terminal = prints and sys.stdout.isatty()
        self._first: tuple[float, int] | None = None
        self._drawn = 0.0
        self._line = ""

    def print(self, text: str) -> None:
        """A line that stays, on the terminal and in the log."""
        if not self._prints:
            return
        self._wipe()
        print(text, flush=True)
        log.info(text)
        self._draw()

    def progress(self, step: int, trained: int, fields: dict[str, str], logged: bool) -> None:
        """Renew the progress line.

        Args:
            step: optimizer steps so far; ``trained`` of them by this process.
            fields: what to show, in order.
            logged: whether the numbers are new; off a terminal only these become lines.
        """
        if not self._prints:
            return
        line = "  ".join(f"{name} {value}" for name, value in {**fields, "left": self._left(step, trained)}.items())
        if logged:
            log.info(line)
        if self._terminal:
            if logged or time.monotonic() - self._drawn > 0.2:
                self._line = line[: shutil.get_terminal_size().columns - 1]
                self._draw()
        elif logged:
            print(line, flush=True)

    def count(self, trained: int) -> None:
        """Begin to measure the pace; called after every step of this process, the first time counts."""
        if self._first is None:
            self._first = (time.monotonic(), trained)

    def end(self, step: int, trained: int) -> str:
        """When the run ends at this pace: "ends in about 1d 02h, on Fri 27 Nov, 14:05"."""
        seconds = self._seconds_left(step, trained)
        if seconds is None:
            return "its end cannot be estimated yet"
        at = time.strftime("%a %d %b, %H:%M", time.localtime(time.time() + seconds))
        return f"ends in about {_clock(seconds)}, on {at}"

    def _left(self, step: int, trained: int) -> str:
        seconds = self._seconds_left(step, trained)
        return "…" if seconds is None else _clock(seconds)

    def _seconds_left(self, step: int, trained: int) -> float | None:
        """At the pace since the first step; what came before, loading a checkpoint say, does not recur."""
        since, before = self._first or (0.0, trained)
        pace = (time.monotonic() - since) / (trained - before) if trained > before else None
        return None if pace is None else pace * (self._total - step)

    def done(self) -> None:
        """Take the progress line away."""
        self._wipe()
        self._line = ""

    def _wipe(self) -> None:
        if self._terminal and self._line:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def _draw(self) -> None:
        if self._terminal and self._line:
            sys.stdout.write(f"\r\033[K{self._line}")
            sys.stdout.flush()
            self._drawn = time.monotonic()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
