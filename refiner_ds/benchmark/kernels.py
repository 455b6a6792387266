"""Bytes and time of each Triton kernel of refined attention, for one pair of blocks and for one linear refiner.

    python -m refiner_ds.benchmark kernels [--batch 64] [--tokens 197] [--heads 12] [--width 32]

On a GPU: bytes an entry of the H maps, time, and the share of the bandwidth that a plain copy reaches in the same run.
Without one the kernels are compiled, not run: registers, spilled bytes and shared memory for ``--architecture``.

Bytes are those of the tensors that a kernel is given, each moved once: the least possible. A share of bandwidth is what
the whole kernel achieves; traffic that the cache did not save counts against it.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.benchmark.attention import Layer, Setting
from refiner_ds.errors import ConfigError

__all__ = ["Row", "main", "measure"]


@dataclass
class Row:
    """One kernel in one step.

    ``bytes_entry`` is bytes moved by all its launches for each entry of the H maps. Time is 0 where nothing ran, the
    compiler's figures are ``None`` where nothing was compiled.
    """

    step: str
    kernel: str
    launches: int
    bytes_entry: float
    milliseconds: float = 0.0
    share: float = 0.0
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None


def run_step(layer: Layer, name: str, dtype: torch.dtype, training: bool) -> None:
    """One step of a map-making block, of a bottleneck or of a linear refiner, on arbitrary numbers."""
    layer.train(training)
    setting = layer.setting
    q, k, value = (x.detach().to(setting.device, dtype).requires_grad_(training) for x in layer.inputs)
    batch, heads, tokens, _ = value.shape
    map_BHNN = value.new_full((batch, heads, tokens, tokens), 1 / tokens).requires_grad_(training)
    with torch.set_grad_enabled(training):
        if name == "bottleneck":
            out = attention.refine(map_BHNN, value, layer.refiner(name), layer.scale, "triton", "activations")
        elif name == "linear":
            out = attention.refine(DeferredMap(q, k, layer.scale), value, layer.refiner(name), backend="triton")
        else:
            out, made_BHNN = attention.attend(DeferredMap(q, k, layer.scale), value, map_BHNN, backend="triton")
        if training:
            outputs = [out, made_BHNN] if name == "map" else [out]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def measure(setting: Setting, tokens: int, architecture: int | None) -> list[Row]:
    """A row for every kernel of every step, training and evaluation.

    Args:
        architecture: compile for this one, run nothing; ``None`` runs on the device.
    """
    from refiner_ds.attention.kernels.launch import compile_only, recording

    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    layer, rows = Layer(setting, tokens), []
    entries = setting.batch * setting.heads * tokens**2
    bandwidth = None if architecture else _bandwidth()
    for name in ("map", "bottleneck", "linear"):
        for training in (True, False):
            with ExitStack() as stack:
                compiled = {} if architecture is None else stack.enter_context(compile_only(architecture))
                launched = stack.enter_context(recording())
                run_step(layer, name, dtype, training)
            step = f"{name}, {'training' if training else 'evaluation'}"
            for kernel in dict.fromkeys(launch.name for launch in launched):
                mine = [launch for launch in launched if launch.name == kernel]
                moved, time = sum(one.bytes for one in mine), sum(one.milliseconds for one in mine)
                row = Row(step, kernel.lstrip("_"), len(mine), moved / entries, time)
                row.share = moved / (time / 1000) / bandwidth if bandwidth and time else 0.0
                for made in compiled.values():
                    if made.name.split()[0] == kernel:
                        row.registers, row.spilled, row.shared = made.registers, made.spilled, made.shared
                rows.append(row)
    return rows


def _bandwidth() -> float:
    """Bytes a second that a plain copy of a gigabyte reads and writes on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    first.record()
    for _ in range(10):
        target.copy_(source)
    last.record()
    torch.cuda.synchronize()
    return 10 * 2 * source.numel() / (first.elapsed_time(last) / 1000)


def table(rows: list[Row]) -> str:
    """The rows as text, with the sums of each step."""
    lines = [
        f"{'step':<24}{'kernel':<24}{'launches':>9}{'B/entry':>9}{'ms':>9}{'of copy':>9}"
        f"{'registers':>11}{'spilled':>9}{'shared':>9}"
    ]
    for step in dict.fromkeys(row.step for row in rows):
        mine = [row for row in rows if row.step == step]
        for row in mine:
            timed = f"{row.milliseconds:>9.3f}{row.share:>8.0%} " if row.milliseconds else f"{'':>18}"
            resources = "".join(
                f"{'' if x is None else x:>{w}}" for x, w in ((row.registers, 11), (row.spilled, 9), (row.shared, 9))
            )
            lines.append(
                f"{step:<24}{row.kernel:<24}{row.launches:>9}{row.bytes_entry:>9.1f}{timed}{resources}".rstrip()
            )
        total = sum(row.milliseconds for row in mine)
        moved = sum(row.bytes_entry for row in mine)
        lines.append(f"{'':<24}{'total':<24}{sum(row.launches for row in mine):>9}{moved:>9.1f}".rstrip())
        lines[-1] += f"{total:>9.3f}" if total else ""
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure or compile, and print; see the head of this file. Returns 0.

    Raises:
        ConfigError: an option cannot be, or there is no Triton to compile with.
    """
    parser = argparse.ArgumentParser(prog="python -m refiner_ds.benchmark kernels", description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 2, help="images a step")
    parser.add_argument("--tokens", type=int, default=197, help="tokens, class token included")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--ratio", type=int, default=3, help="expanded maps a head")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of maps, queries, keys and values")
    parser.add_argument("--architecture", type=int, help="compile for it and run nothing; 90 where there is no GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args(argv)
    if min(given.batch, given.heads, given.width, given.ratio) < 1 or given.tokens < 2:
        raise ConfigError("--batch, --heads, --width and --ratio must be 1 or more, --tokens 2")
    architecture = given.architecture or (None if on_gpu else 90)
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ConfigError("kernels are Triton's, which is not installed; pip install triton") from None
    setting = Setting(
        given.batch, given.heads, given.width, given.ratio, "cpu" if architecture else "cuda", given.dtype
    )
    rows = measure(setting, given.tokens, architecture)
    if given.json:
        print(json.dumps({"setting": asdict(setting), "tokens": given.tokens, "rows": [asdict(row) for row in rows]}))
        return 0
    where = f"compiled for sm_{architecture}, not run" if architecture else torch.cuda.get_device_name()
    print(
        f"{setting.batch} images, {given.tokens} tokens, {setting.heads} heads of {setting.width}, "
        f"r = {setting.ratio}, {setting.dtype}, {where}"
    )
    print(table(rows))
    return 0
