"""Which kernels compile without spilling a register, for cards that are not here: registers, plane, shared memory.

    python -m refiner_ds.benchmark compiled [--architectures 80 90 gfx942] [--models S L] [--sizes 224]

Every kernel is compiled for every card, model and image size, in several processes, and nothing is run. A row is a
kernel on a card: the most of all models and sizes, and how many of these spill. Triton keeps what it has compiled.
``--configurations`` adds the kernels that tile configurations change (attention/kernels/configurations.py), and
``--padded`` the forms that kernels have for padded sequences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context

from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError

__all__ = ["MODELS", "SHARED", "Row", "compile_all", "main"]

# Model -> heads and their width.
MODELS = {"S": (12, 32), "M": (12, 35), "L": (16, 32)}
SIZES = (224, 384, 448)
# Architecture -> bytes of shared memory that a program may take: A100, L4 and L40S, H100, B200, MI300X.
SHARED = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}


@dataclass
class Row:
    """One kernel on one card, over all shapes: the most of each, and the shapes that spill or do not compile."""

    architecture: str
    kernel: str
    shapes: int = 0
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    spilling: int = 0
    too_large: int = 0


Found = list[tuple[str, int, int, int]]


def compile_shape(
    architecture: str, heads: int, width: int, tokens: int, configurations: bool = False, dtype: str = "bf16",
    padded: bool = False,
) -> Found:  # fmt: skip
    """Every kernel of a shape: name, registers, bytes of plane, and of shared memory.

    Args:
        configurations: those of configurations, "reduce[tall]", too.
        dtype: of the maps, "bf16" or "fp32".
        padded: the forms for padded sequences, "reduce, padded", too.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from refiner_ds.attention.kernels.configurations import CONFIGURATIONS, joined, using
    from refiner_ds.attention.kernels.launch import compile_only
    from refiner_ds.benchmark.attention import DTYPES, Layer, Setting
    from refiner_ds.benchmark.kernels import run_step

    torch.set_num_threads(1)
    layer, maps = Layer(Setting(1, heads, width, dtype=dtype), tokens), DTYPES[dtype]
    target = int(architecture) if architecture.isdigit() else architecture
    with compile_only(target) as compiled:
        forms = (False, True) if padded else (False,)
        for name, training, form in product(("map", "bottleneck", "linear"), (True, False), forms):
            run_step(layer, name, maps, training, form)
    found = [(_kernel(one.name), one.registers, one.spilled, one.shared) for one in compiled.values()]
    for kind, names in CONFIGURATIONS.items() if configurations else ():
        for name, changed in names.items():
            with compile_only(target) as compiled, using(kind, name):
                run_step(layer, kind, maps, True)
            found += [
                (joined(kernel, name), one.registers, one.spilled, one.shared)
                for one in compiled.values()
                if (kernel := one.name.split()[0].lstrip("_")) in changed
            ]
    return found


def _kernel(name: str) -> str:
    """A kernel's name, and whether it is the form for padded sequences, of the name that has its constants too."""
    kernel, *constants = name.split()
    return kernel.lstrip("_") + (", padded" if "MASKED=True" in constants else "")


def compile_all(
    architectures: Sequence[str],
    models: Sequence[str],
    sizes: Sequence[int],
    processes: int,
    configurations: bool = False,
    dtype: str = "bf16",
    padded: bool = False,
) -> list[Row]:
    """A row for each kernel and architecture."""
    shapes = list(product(architectures, models, sizes))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                compile_shape, architecture, *MODELS[model], 1 + (size // 16) ** 2, configurations, dtype, padded
            )
            for architecture, model, size in shapes
        ]
        rows: dict[tuple[str, str], Row] = {}
        for (architecture, _, _), job in zip(shapes, jobs, strict=True):
            for kernel, registers, spilled, shared in job.result():
                row = rows.setdefault((architecture, kernel), Row(architecture, kernel))
                row.shapes += 1
                row.registers, row.shared = max(row.registers, registers), max(row.shared, shared)
                row.spilled = max(row.spilled, spilled)
                row.spilling += spilled > 0
                row.too_large += shared > SHARED[architecture]
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """A line for each kernel, three figures for each architecture: registers, bytes spilled, KiB of shared memory."""
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    lines = [f"{'kernel':<28}" + "".join(f"{_named(one):>22}" for one in architectures)]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        cells = {row.architecture: row for row in rows if row.kernel == kernel}
        lines.append(f"{kernel:<28}" + "".join(f"{_cell(cells.get(one)):>22}" for one in architectures))
    return "\n".join(lines)


def _named(architecture: str) -> str:
    return f"sm_{architecture}" if architecture.isdigit() else architecture


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    spilled = f"{row.spilled} ({row.spilling}/{row.shapes})" if row.spilled else "0"
    return f"{row.registers} / {spilled} / {-(-row.shared // 1024)}{' !' if row.too_large else ''}"


def main(argv: list[str] | None = None) -> int:
    """Compile and print; returns 0.

    Raises:
        ConfigError: there is no Triton to compile with.
    """
    parser = Parser(prog="python -m refiner_ds.benchmark compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=SHARED, default=list(SHARED), metavar="NAME")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="S, M, L; M has heads of 35")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="of images, pixels")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at a time")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the maps (default: bf16)")
    parser.add_argument("--configurations", action="store_true", help="of tiles, those that a run may choose, too")
    parser.add_argument("--padded", action="store_true", help="the forms for padded sequences too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args(argv)
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ConfigError("kernels are Triton's, which is not installed; pip install triton") from None
    if given.processes < 1 or min(given.sizes) < 16:
        raise ConfigError("--processes must be 1 or more, --sizes 16")
    rows = compile_all(
        given.architectures, given.models, given.sizes, given.processes, given.configurations, given.dtype,
        given.padded,
    )  # fmt: skip
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print("registers / bytes spilled (shapes that spill) / KiB of shared memory; ! more than the card has")
    print(table(rows))
    return 0
