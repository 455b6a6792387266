"""What a user can be refused for, and how a command ends then.

Every refusal carries one sentence that names the file, key or sample and says what would be right. Commands print it
after ``error:`` and leave with exit code 2, or its own (`report_errors`); nothing else in the package may end that way.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EPIPE
from functools import wraps

from refiner_ds.exit_codes import CRASHED, REFUSED, UNREAD
from refiner_ds.output import OutputError, lasting_output, reporting_output

HIDDEN = "***"
VARIABLE = re.compile(r"\$\{(\w+)\}")
# User and password of a URL: also of one with / ? or # in them, and of one that was taken for a path (http:/user@host).
USER_IN_URL = re.compile(
    r"(\b[a-z][a-z0-9+.-]*:/{1,2})(?!/)([^/\s'\"?#]+|[^/\s'\"@?#:]*:(?!\d*(?:[/?#]|$))[^\s'\"]*)@", re.IGNORECASE
)
QUERY_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2}[^\s'\"?#]*\?)([^\s'\"#]*[^\s'\"#:,;.)])", re.IGNORECASE)


class RefinerError(Exception):
    """A refusal: one sentence for the person at the keyboard, no traceback."""

    exit_code = REFUSED


class ConfigError(RefinerError, ValueError):
    """A run file, an override or a cluster profile says something that cannot be meant."""


class DataError(RefinerError):
    """A shard set, a shard or a sample is missing, damaged or not what its index says."""


class WorkerError(RefinerError):
    """A loader worker died: nothing was wrong with what was asked for, and another attempt may succeed."""

    exit_code = CRASHED


class LaunchError(RefinerError):
    """A job cannot be submitted or started from here."""


class CheckpointError(RefinerError):
    """A checkpoint is missing, damaged or does not fit the run."""


def reports_errors() -> bool:
    """Whether this process prints refusals: the first of each node, since data may be missing on one node alone."""
    return "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK"))


def without_secrets(text: str) -> str:
    """A text without the user names, passwords and query strings of the URLs in it."""
    text = USER_IN_URL.sub(lambda match: hidden(match) + "@", text)
    return QUERY_IN_URL.sub(hidden, text)


def hidden(match: re.Match[str]) -> str:
    """What stands for a match whose second part is a secret; names of environment variables are none."""
    return match[1] + (HIDDEN if VARIABLE.sub("", match[2]).strip(":'\"") else match[2])


def print_error(sentence: str) -> None:
    """Print a refusal, or lose it where standard error cannot be written: the exit code stays what it is to be.

    It may quote what was typed where no address was wanted, so secrets are taken out here as well.
    """
    with lasting_output():
        print(f"error: {without_secrets(sentence)}", file=sys.stderr, flush=True)


def report_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator: a refused command prints one sentence on stderr and returns exit code 2.

    All processes of a node are refused for the same reason; the first prints it (`reports_errors`). A command whose
    output nobody reads any more (``| head``) ends without a word.
    """

    @wraps(main)
    def reported(*arguments: object, **named: object) -> int:
        try:
            with reporting_output():
                return main(*arguments, **named)
        except RefinerError as error:
            if reports_errors():
                print_error(str(error))
            return error.exit_code
        except OutputError as error:
            if error.errno == EPIPE:
                return UNREAD
            print_error(f"standard output cannot be written: {error.strerror}")
            return CRASHED

    return reported


@contextmanager
def report_rank_errors(rank: int) -> Iterator[None]:
    """Print a refusal that one rank meets alone in the middle of common work: a damaged sample, say.

    `report_errors` prints only for the first rank of a node, since before that work all ranks meet the same.
    """
    try:
        yield
    except RefinerError as error:
        logging.getLogger("refiner_ds").error("%s", without_secrets(str(error)))
        if not reports_errors():
            named = str(error).startswith(f"rank {rank} ")  # as that of a rank without memory, on whichever rank
            print_error(str(error) if named else f"rank {rank}: {error}")
        raise
