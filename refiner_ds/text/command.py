"""What the commands of text share on their command lines; no transformers, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from refiner_ds.command_line import command_parser

__all__ = ["run_parser"]


def run_parser(docstring: str | None, prog: str, output: str, seeds: str) -> argparse.ArgumentParser:
    """A parser that takes a run file, a folder for results and a seed, under any launcher.

    Args:
        output: the folder where none is given.
        seeds: what the seed draws, for the help.
    """
    parser = command_parser(docstring, prog)
    parser.add_argument("--config", required=True, metavar="FILE", help="run file, such as those in ds_configs/glue")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="FOLDER", help=f"default: {output}")
    parser.add_argument("--seed", type=int, default=0, help=f"of {seeds} (default: 0)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser
