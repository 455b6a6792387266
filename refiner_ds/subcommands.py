"""Commands of several parts: ``python -m refiner_ds.benchmark NAME …`` runs the module that NAME stands for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from refiner_ds.errors import ConfigError


def run_subcommand(package: str, modules: Mapping[str, str], argv: list[str] | None) -> int:
    """Run the subcommand named first on the command line; the rest of the line is its own.

    Args:
        modules: by name, a module with ``main(argv)``; only the one asked for is imported.
        argv: the command line after the program's name; None: this process's.
    Returns:
        Its exit code; 0 after ``--help``.
    Raises:
        ConfigError: there is no such subcommand.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(f"usage: python -m {package} {{{','.join(modules)}}} [options]; NAME --help lists its options")
        return 0
    if name not in modules:
        near = difflib.get_close_matches(name, modules, 1)
        right = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(modules)}"
        said = f"{name} is not a subcommand" if name else "no subcommand is given"
        raise ConfigError(f"{package}: {said}; {right}")
    main: Callable[[list[str]], int] = import_module(modules[name]).main
    return main(rest)
