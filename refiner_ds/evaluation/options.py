"""Options that commands which show a model a set of images have in common; no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from refiner_ds.errors import ConfigError

__all__ = ["add_model_options", "check_crop_ratio", "check_model_options"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, at which image size, and how it is computed."""
    parser.add_argument("place", metavar="MODEL", help="run folder, checkpoint in it, export, or timm:NAME=WEIGHTS")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the last ones")
    parser.add_argument("--test-size", type=int, metavar="PX", help="side of the images (default: as trained)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, a line each, where unknown")
    parser.add_argument("--batch", type=int, metavar="N", help="images a process computes at once")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes a rank")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: the run folder)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's


def check_model_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number that cannot be meant."""
    for flag in ("batch", "test_size"):
        if (number := getattr(options, flag)) is not None and number < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {number}: must be 1 or more")


def check_crop_ratio(flag: str, ratio: float) -> None:
    """Raise ConfigError for a ratio at which nothing can be seen."""
    if not 0.1 <= ratio <= 4:
        raise ConfigError(f"{flag} {ratio:g}: must lie between 0.1 and 4")
