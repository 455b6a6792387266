"""The parser that every command begins with: its help is the docstring of its module."""

from __future__ import annotations

import argparse

__all__ = ["command_parser"]


def command_parser(docstring: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that prints the docstring as it stands: its first line above the options, the others below.

    Args:
        docstring: the module's, or ``None`` where Python was told to drop it.
        prog: how the command is called; None: as the file is.
    """
    first, _, others = (docstring or "").partition("\n")
    return argparse.ArgumentParser(
        prog=prog, description=first, epilog=others, formatter_class=argparse.RawDescriptionHelpFormatter
    )
