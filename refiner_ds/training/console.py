"""What a person sees while a run goes on: one progress line on a terminal, plain lines elsewhere, the rest in a file.

logs/rank_0.log     everything: our lines, warnings and log records of other libraries, one file a rank
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refiner_ds.errors import RefinerError, speaks

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
log = logging.getLogger("refiner_ds")


def hush() -> None:
    """Before heavy imports: keep libraries from talking over the progress line. ``write_logs`` gives them a file."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # DeepSpeed says this on import, before its records can be given a file, on every rank of a CPU machine.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def write_logs(folder: Path, rank: int) -> None:
    """Send every library's records and warnings, and ours, to ``logs/rank_N.log``."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank_{rank}.log")
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in list(logging.root.manager.loggerDict):
        # DeepSpeed and torch write to the terminal by handlers of their own; here they follow the root.
        if name.partition(".")[0] in ("DeepSpeed", "deepspeed", "torch", "tensorboard", "matplotlib", "PIL"):
            logger = logging.getLogger(name)
            logger.handlers[:] = []
            logger.propagate = True
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


@contextmanager
def heard_from(rank: int) -> Iterator[None]:
    """Say what a rank is refused in the middle of common work: a damaged sample, say, which it alone has met.

    `refusals_are_told` has the first rank of a node speak, since before that work all of them meet the same.
    """
    try:
        yield
    except RefinerError as error:
        log.error("%s", error)
        if not speaks():
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        raise


class Console:
    """The leading process's voice; a silent one elsewhere.

    Args:
        speaks: whether this process may write to the terminal.
        total_steps: optimizer steps of the whole run, for the time left.
    """

    def __init__(self, speaks: bool, total_steps: int = 0) -> None:
        self._speaks = speaks
        self._total = total_steps
        self._terminal = speaks and sys.stdout.isatty()
        self._began = time.monotonic()
        self._drawn = 0.0
        self._line = ""

    def say(self, text: str) -> None:
        """A line that stays, on the terminal and in the log."""
        if not self._speaks:
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
        if not self._speaks:
            return
        left = (time.monotonic() - self._began) / max(trained, 1) * (self._total - step)
        line = "  ".join(f"{name} {value}" for name, value in {**fields, "left": _clock(left)}.items())
        if logged:
            log.info(line)
        if self._terminal:
            if logged or time.monotonic() - self._drawn > 0.2:
                self._line = line[: shutil.get_terminal_size().columns - 1]
                self._draw()
        elif logged:
            print(line, flush=True)

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
