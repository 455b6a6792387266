"""``python -m refiner_ds.benchmark NAME [options]``: run one benchmark and print its table."""

from __future__ import annotations

import sys

from refiner_ds.errors import report_errors
from refiner_ds.subcommands import run_subcommand

BENCHMARKS = {
    "attention": "refiner_ds.benchmark.attention",
    "checkpoint": "refiner_ds.benchmark.checkpoint",
    "compiled": "refiner_ds.benchmark.compiled",
    "gpu": "refiner_ds.benchmark.gpu",
    "kernels": "refiner_ds.benchmark.kernels",
    "launch": "refiner_ds.benchmark.launch",
    "loader": "refiner_ds.benchmark.loader",
    "model": "refiner_ds.benchmark.model",
    "scale": "refiner_ds.benchmark.scale",
    "selfcheck": "refiner_ds.benchmark.selfcheck",
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_subcommand("refiner_ds.benchmark", BENCHMARKS, argv)


if __name__ == "__main__":
    sys.exit(main())
