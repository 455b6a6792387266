"""What a user can be refused for.

Every one of these carries one sentence that names the file, key or sample and says what would be right. Commands print
it after ``error:`` and leave with exit code 2; nothing else in the package may end that way.
"""

from __future__ import annotations


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
