"""The parser that every command begins with: its help is the docstring of its module."""

from __future__ import annotations

import argparse
from typing import NoReturn

from refiner_ds.errors import without_secrets

__all__ = ["Parser", "command_parser"]


class Parser(argparse.ArgumentParser):
    """A parser whose refusals hide what is secret in an address that they quote."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the refusal, and leave with exit code 2."""
        super().error(without_secrets(message))


def command_parser(docstring: str | None, prog: str | None = None) -> Parser:
    """A parser that prints the docstring as it stands: its first line above the options, the others below.

    Args:
        docstring: the module's, or ``None`` where Python was told to drop it.
        prog: how the command is called; None: as the file is.
    """
    first, _, others = (docstring or "").partition("\n")
    return Parser(prog=prog, description=first, epilog=others, formatter_class=argparse.RawDescriptionHelpFormatter)
