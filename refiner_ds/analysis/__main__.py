"""``python -m refiner_ds.analysis NAME [options]``: one look into trained models."""

from __future__ import annotations

import sys

from refiner_ds.errors import report_errors
from refiner_ds.subcommands import run_subcommand

COMMANDS = {
    "features": "refiner_ds.analysis.features",
    "maps": "refiner_ds.analysis.maps",
    "weights": "refiner_ds.analysis.refiner_weights",
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_subcommand("refiner_ds.analysis", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
