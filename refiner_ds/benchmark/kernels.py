"""Bytes and time of each Triton kernel of refined attention, for one pair of blocks and for one linear refiner.

    python -m refiner_ds.benchmark kernels [--batch 64] [--tokens 197] [--heads 12] [--width 32]

On a GPU: bytes an entry of the H maps, time, and the share of the bandwidth that a plain copy reaches in the same run.
Without one the kernels are compiled, not run: registers, spilled bytes and shared memory for ``--architecture``. Either
way a column says what the compiled code takes at least, and by what it is bound (``predicted.py``), on ``--gpu``.

Bytes are those of the tensors that a kernel is given, each moved once: the least possible. A share of bandwidth is what
the whole kernel achieves; traffic that the cache did not save counts against it.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.benchmark.attention import Layer, Setting
from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError
from refiner_ds.gpus import Gpu, gpu, recognise

if TYPE_CHECKING:
    from refiner_ds.attention.kernels.launch import Launch

__all__ = ["Row", "main", "measure"]


@dataclass
class Row:
    """One kernel in one step.

    ``bytes_entry`` is bytes moved by all its launches for each entry of the H maps. Time is 0 where nothing ran, the
    compiler's figures are ``None`` where nothing was compiled. ``predicted`` is milliseconds, ``warps`` those on an SM.
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
    warps: int | None = None
    predicted: float | None = None
    bound: str = ""


def run_step(layer: Layer, name: str, dtype: torch.dtype, training: bool, padded: bool = False) -> None:
    """One step of a map-making block, of a bottleneck or of a linear refiner, on arbitrary numbers.

    Args:
        padded: of sequences whose last token is padding.
    """
    layer.train(training)
    setting = layer.setting
    q, k, value = (x.detach().to(setting.device, dtype).requires_grad_(training) for x in layer.inputs)
    batch, heads, tokens, _ = value.shape
    map_BHNN = value.new_full((batch, heads, tokens, tokens), 1 / tokens).requires_grad_(training)
    mask_BN = torch.arange(tokens, device=setting.device).lt(tokens - 1).expand(batch, -1) if padded else None
    deferred = DeferredMap(q, k, layer.scale, mask_BN=mask_BN)
    with torch.set_grad_enabled(training):
        if name == "bottleneck":
            out = attention.refine(map_BHNN, value, layer.refiner(name), layer.scale, "triton", "activations", mask_BN)
        elif name == "linear":
            out = attention.refine(deferred, value, layer.refiner(name), backend="triton")
        else:
            out, made_BHNN = attention.attend(deferred, value, map_BHNN, backend="triton")
        if training:
            outputs = [out, made_BHNN] if name == "map" else [out]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def measure(setting: Setting, tokens: int, architecture: int | None, card: Gpu | None) -> list[Row]:
    """A row for every kernel of every step, training and evaluation.

    Args:
        architecture: compile for this one, run nothing; ``None`` runs on the device.
        card: whose time is predicted; ``None`` predicts none.
    """
    from refiner_ds.attention.kernels.launch import compile_only, recording

    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    layer, rows = Layer(setting, tokens), []
    entries = setting.batch * setting.heads * tokens**2
    bandwidth = None if architecture else _bandwidth()
    for name in ("map", "bottleneck", "linear"):
        for training in (True, False):
            with ExitStack() as stack:
                if architecture is not None:
                    stack.enter_context(compile_only(architecture))
                launched = stack.enter_context(recording())
                run_step(layer, name, dtype, training)
            step = f"{name}, {'training' if training else 'evaluation'}"
            for kernel in dict.fromkeys(launch.name for launch in launched):
                mine = [launch for launch in launched if launch.name == kernel]
                row = _row(step, mine, entries, card, architecture or _capability())
                row.share = moved_share(row, entries, bandwidth)
                rows.append(row)
    return rows


def moved_share(row: Row, entries: int, bandwidth: float | None) -> float:
    """The share of a copy's bandwidth that was reached; 0 where nothing ran."""
    if not bandwidth or not row.milliseconds:
        return 0.0
    return row.bytes_entry * entries / (row.milliseconds / 1000) / bandwidth


def _row(step: str, launched: list[Launch], entries: int, card: Gpu | None, architecture: int) -> Row:
    """All launches of one kernel; the compiler's figures are the largest."""
    from refiner_ds.benchmark.predicted import LIMITS, predict, warps_an_sm

    moved, time = sum(one.bytes for one in launched), sum(one.milliseconds for one in launched)
    row = Row(step, launched[0].name.lstrip("_"), len(launched), moved / entries, time)
    if compiled := [one.compiled for one in launched if one.compiled is not None]:
        row.registers, row.spilled, row.shared = (
            max(getattr(one, field) for one in compiled) for field in ("registers", "spilled", "shared")
        )
        if architecture in LIMITS:
            row.warps = min(warps_an_sm(one, architecture) for one in compiled)
    found = [None if card is None else predict(one, card, architecture) for one in launched]
    known = [one for one in found if one is not None]
    if known and len(known) == len(found):
        row.predicted = sum(one.milliseconds for one in known)
        row.bound = max(known, key=lambda one: one.milliseconds).bound
    return row


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


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
        f"{'step':<24}{'kernel':<22}{'launches':>9}{'B/entry':>9}{'ms':>9}{'of copy':>9}"
        f"{'registers':>11}{'spilled':>9}{'shared':>9}{'warps/SM':>10}{'predicted':>11}  bound by"
    ]
    for step in dict.fromkeys(row.step for row in rows):
        mine = [row for row in rows if row.step == step]
        for row in mine:
            timed = f"{row.milliseconds:>9.3f}{row.share:>8.0%} " if row.milliseconds else f"{'':>18}"
            figures = ((row.registers, 11), (row.spilled, 9), (row.shared, 9), (row.warps, 10))
            resources = "".join(f"{'' if x is None else x:>{width}}" for x, width in figures)
            predicted = "" if row.predicted is None else f"{row.predicted:>11.3f}  {row.bound}"
            lines.append(
                f"{step:<24}{row.kernel:<22}{row.launches:>9}{row.bytes_entry:>9.1f}{timed}{resources}"
                f"{predicted}".rstrip()
            )
        total, predicted_total = sum(row.milliseconds for row in mine), predicted_sum(mine)
        moved = sum(row.bytes_entry for row in mine)
        shown = (f"{total:>9.3f}" if total else f"{'':>9}") + f"{'':>48}"
        shown += "" if predicted_total is None else f"{predicted_total:>11.3f}"
        lines.append(f"{'':<24}{'total':<22}{sum(row.launches for row in mine):>9}{moved:>9.1f}{shown}".rstrip())
    return "\n".join(lines)


def predicted_sum(rows: list[Row]) -> float | None:
    """Milliseconds; ``None`` where one of them is not known."""
    known = [row.predicted for row in rows if row.predicted is not None]
    return sum(known) if len(known) == len(rows) else None


def pair_line(rows: list[Row], pairs: int, images: int, card: Gpu) -> str:
    """Training the attention of a whole network of pairs of blocks, an image."""
    mine = [row for row in rows if row.step in ("map, training", "bottleneck, training")]
    parts = []
    for what, total in (("predicted", predicted_sum(mine)), ("measured", sum(row.milliseconds for row in mine))):
        if total:
            parts.append(f"{what} {pairs * total / images:.3f} ms an image")
    least = sum(row.bytes_entry for row in mine)
    return f"{pairs} pairs of blocks, training, kernels alone, on {card.name}: {', '.join(parts)}; {least:.0f} B/entry"


def main(argv: list[str] | None = None) -> int:
    """Measure or compile, and print; see the head of this file. Returns 0.

    Raises:
        ConfigError: an option cannot be, or there is no Triton to compile with.
    """
    parser = Parser(prog="python -m refiner_ds.benchmark kernels", description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 2, help="images a step")
    parser.add_argument("--tokens", type=int, default=197, help="tokens, class token included")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--ratio", type=int, default=3, help="expanded maps a head")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of maps, queries, keys and values")
    parser.add_argument("--architecture", type=int, help="compile for it and run nothing; 90 where there is no GPU")
    parser.add_argument("--gpu", help="whose time is predicted; by default this one, or one of the architecture")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of blocks of a network: 8 of S, 16 of M and L")
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
    from refiner_ds.benchmark.predicted import gpu_of

    here = gpu_of(architecture) if architecture else recognise(torch.cuda.get_device_name())
    card = gpu(given.gpu) if given.gpu else here
    rows = measure(setting, given.tokens, architecture, card)
    if given.json:
        print(json.dumps({"setting": asdict(setting), "tokens": given.tokens, "rows": [asdict(row) for row in rows]}))
        return 0
    where = f"compiled for sm_{architecture}, not run" if architecture else torch.cuda.get_device_name()
    print(
        f"{setting.batch} images, {given.tokens} tokens, {setting.heads} heads of {setting.width}, "
        f"r = {setting.ratio}, {setting.dtype}, {where}"
    )
    print(table(rows))
    if card is not None:
        print(pair_line(rows, given.pairs, setting.batch, card))
    return 0
