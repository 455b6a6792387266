"""What a user can be refused for.

Every one of these carries one sentence that names the file, key or sample and says what would be right. Commands print
it after ``error:`` and leave with exit code 2 (`refusals_are_told`); nothing else in the package may end that way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps

REFUSED = 2  # exit code


class RefinerError(Exception):
    """A refusal: one sentence for the person at the keyboard, no traceback."""


class ConfigError(RefinerError, ValueError):
    """A run file, an override or a cluster profile says something that cannot be meant."""


class DataError(RefinerError):
    """A shard set, a shard or a sample is missing, damaged or not what its index says."""


class LaunchError(RefinerError):
    """A job cannot be submitted or started from here."""


class CheckpointError(RefinerError):
    """A checkpoint is missing, damaged or does not fit the run."""


def speaks() -> bool:
    """Whether this process is to say what it is refused: a node's first, for data may be missing on one node alone."""
    return "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK"))


def refusals_are_told(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command's ``main`` end with one sentence on stderr and exit code 2 where it is refused.

    Among the processes of a node every one meets the same refusal; the first says it (`speaks`).
    """

    @wraps(main)
    def told(*arguments: object, **named: object) -> int:
        try:
            return main(*arguments, **named)
        except RefinerError as error:
            if speaks():
                print(f"error: {error}", file=sys.stderr, flush=True)
            return REFUSED

    return told
