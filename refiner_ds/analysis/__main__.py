"""``python -m refiner_ds.analysis NAME [options]``: one look into trained models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from refiner_ds.errors import ConfigError, report_errors

# Name -> module with main(argv); imported only when asked for.
COMMANDS = {
    "features": "refiner_ds.analysis.features",
    "maps": "refiner_ds.analysis.maps",
    "weights": "refiner_ds.analysis.refiner_weights",
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command named first; the rest of the line is its own. Returns 0, or 2 where it is refused."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(f"usage: python -m refiner_ds.analysis {{{','.join(COMMANDS)}}} …; NAME --help lists its options")
        return 0
    if name not in COMMANDS:
        said = f"{name} is no command" if name else "no command is named"
        raise ConfigError(f"{said} of refiner_ds.analysis; it must be one of {', '.join(COMMANDS)}")
    run: Callable[[list[str]], int] = import_module(COMMANDS[name]).main
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
