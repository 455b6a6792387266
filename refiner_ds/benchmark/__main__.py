"""``python -m refiner_ds.benchmark NAME [options]``: run one benchmark and print its table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from refiner_ds.errors import ConfigError, report_errors

# Name -> module with main(argv); imported only when asked for, since each brings its own weight.
BENCHMARKS = {
    "attention": "refiner_ds.benchmark.attention",
    "kernels": "refiner_ds.benchmark.kernels",
    "loader": "refiner_ds.benchmark.loader",
    "model": "refiner_ds.benchmark.model",
    "scale": "refiner_ds.benchmark.scale",
}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark named first; the rest of the line is its own.

    Returns:
        0, or 2 when the name is unknown or the benchmark refuses its options.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        names = ",".join(BENCHMARKS)
        print(f"usage: python -m refiner_ds.benchmark {{{names}}} [options]; NAME --help lists its options")
        return 0
    if name not in BENCHMARKS:
        said = f"{name} is not a benchmark" if name else "no benchmark is named"
        raise ConfigError(f"{said}; it must be one of {', '.join(BENCHMARKS)}")
    run: Callable[[list[str]], int] = import_module(BENCHMARKS[name]).main
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
