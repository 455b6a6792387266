"""Cost of one layer of refined attention, every backend side by side in one run.

    python -m refiner_ds.benchmark attention [--tokens 50 197 577] [--dtype bf16] [--plot attention.png]

    linear        queries and keys to refined A·V: the paper's refiner
    bottleneck    a map to refined A·V: the released one; tiled and triton save the map, or also two activations
    attention     softmax attention without a refiner, by PyTorch's fused kernel

It prints milliseconds an image, MiB saved for backward by one more image, bytes moved in training for each entry of the
H maps, and the error against float64 on the same inputs, with ratios to the eager backend. ``--plot`` also draws memory
and time against the number of tokens. Bytes moved are "uncached" where they go to or from a tensor that does not fit
into cache (above 4 MiB on CPU, the second-level cache on a GPU), on enough images that no tensor of maps fits;
``traffic.py`` says how they are counted. The triton backend appears where it supports the case. A row "auto" repeats
the one that a run would choose for training (``attention/choice.py``, which measures for itself); evaluation is always
by the default.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiner_ds import attention
from refiner_ds.attention import (
    BottleneckWeights,
    DeferredMap,
    LinearWeights,
    LocalKernels,
    Norm,
    RefinerWeights,
    choice,
)
from refiner_ds.attention.tiling.tiles import CPU_TILE_BYTES
from refiner_ds.benchmark.measure import best_seconds, saved_bytes
from refiner_ds.benchmark.traffic import moved_bytes
from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError
from refiner_ds.memory import free_memory

__all__ = ["Row", "Setting", "main", "measure"]

# Case -> candidates: (label, backend, save_for_backward). The first is the unit of the ratios; triton is left out where
# it cannot run.
CASES: dict[str, list[tuple[str, str, str]]] = {
    "linear": [("eager", "eager", "auto"), ("tiled", "tiled", "auto"), ("triton", "triton", "auto")],
    "bottleneck": [
        ("eager", "eager", "auto"),
        ("tiled, activations", "tiled", "activations"),
        ("tiled, map", "tiled", "map"),
        ("triton, activations", "triton", "activations"),
        ("triton, map", "triton", "map"),
    ],
    "attention": [("fused softmax", "", "")],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
MOST_IMAGES = 256
CHOICE_SECONDS = 1.5  # for timing the candidates of one case: what a run takes for two kinds of attention is twice that


@dataclass
class Row:
    """One candidate's figures for one case and number of tokens.

    Bytes moved are for each entry of the H maps, errors of the output and the worst gradient.
    """

    tokens: int
    case: str
    backend: str
    training_ms: float
    evaluation_ms: float
    saved_mib_image: float
    moved_entry: float
    uncached_entry: float
    output_error: float
    gradient_error: float


@dataclass(frozen=True)
class Setting:
    """What is measured: images a step, heads and their width, expansion, where, and how precisely (bf16: autocast)."""

    batch: int = 8
    heads: int = 12
    width: int = 32
    ratio: int = 3
    device: str = "cpu"
    dtype: str = "fp32"

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast for bf16."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16")


class Layer(nn.Module):
    """The weights of one layer and its inputs for ``tokens`` tokens, all drawn from one seed."""

    def __init__(self, setting: Setting, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads, wide = setting.heads, setting.heads * setting.ratio
        self.setting, self.scale = setting, setting.width**-0.5
        shape = (setting.batch, heads, tokens, setting.width)
        self.direction = torch.cos(torch.arange(math.prod(shape), device=setting.device)).view(shape)
        self.inputs = [torch.randn(shape).to(DTYPES[setting.dtype]) for _ in range(3)]
        self.expand = nn.Parameter(torch.randn(wide, heads) / heads**0.5)
        self.kernel = nn.Parameter(torch.randn(wide, 1, 3, 3) / 3)
        self.project = nn.Parameter(torch.randn(heads, wide) / wide**0.5)
        self.norms = nn.ModuleList(attention.BatchNorm(count) for count in (wide, wide, heads, heads))
        self.to(setting.device)

    def refiner(self, case: str) -> RefinerWeights:
        """The weights as the operator takes them."""
        local = LocalKernels((self.kernel,), "none", (1, 1))
        if case == "linear":
            return LinearWeights(self.expand, local, self.project)
        norms: list[Norm] = [cast(attention.BatchNorm, norm).as_norm() for norm in self.norms]
        return BottleneckWeights(self.expand, norms[0], local, norms[1], self.project, norms[2], norms[3])

    def leaves(self, case: str, images: int) -> list[Tensor]:
        """Fresh inputs that require gradients: q, k, v, or for a bottleneck the map and v."""
        dtype = self.expand.dtype if self.setting.dtype == "fp32" else DTYPES[self.setting.dtype]
        q_BHNd, k_BHNd, v_BHNd = (x[:images].to(self.setting.device, dtype) for x in self.inputs)
        if case == "bottleneck":
            map_BHNN = attention.make_map(DeferredMap(3 * q_BHNd, k_BHNd, self.scale))
            return [x.detach().requires_grad_() for x in (map_BHNN, v_BHNd)]
        return [x.requires_grad_() for x in (q_BHNd.clone(), k_BHNd.clone(), v_BHNd.clone())]

    def compute(self, case: str, backend: str, save_for_backward: str, inputs: list[Tensor]) -> Tensor:
        """A·V, refined or not."""
        *source, v_BHNd = inputs
        if case == "bottleneck":
            return attention.refine(source[0], v_BHNd, self.refiner(case), self.scale, backend, save_for_backward)
        scores = DeferredMap(source[0], source[1], self.scale)
        if case == "attention":
            return attention.plain_attention(scores, v_BHNd)
        return attention.refine(scores, v_BHNd, self.refiner(case), backend=backend)


def _train(layer: Layer, case: str, backend: str, save_for_backward: str, inputs: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    layer.train()
    with layer.setting.precision():
        out = layer.compute(case, backend, save_for_backward, inputs)
    weights = [] if case == "attention" else [layer.expand, layer.kernel, layer.project]
    direction = layer.direction[: len(out)].to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*inputs, *weights], direction)]


@torch.no_grad()
def _evaluate(layer: Layer, case: str, backend: str, save_for_backward: str, inputs: list[Tensor]) -> Tensor:
    layer.eval()
    with layer.setting.precision():
        return layer.compute(case, backend, save_for_backward, inputs)


def _save_for_backward(layer: Layer, case: str, backend: str, save_for_backward: str, images: int) -> int:
    inputs = layer.leaves(case, images)
    layer.train()
    with layer.setting.precision():
        return saved_bytes(lambda: layer.compute(case, backend, save_for_backward, inputs), layer)


def _candidates(layer: Layer) -> dict[str, list[tuple[str, str, str]]]:
    """The candidates of each case that this layer can be computed with."""
    return {
        case: [one for one in backends if one[1] != "triton" or _kernels_support(layer, case)]
        for case, backends in CASES.items()
    }


def _kernels_support(layer: Layer, case: str) -> bool:
    *source, v_BHNd = layer.leaves(case, 1)
    layer.train()
    attn = source[0] if case == "bottleneck" else DeferredMap(source[0], source[1], layer.scale)
    return attention.BACKENDS["triton"].supports(attention.Case(attn, v_BHNd, layer.refiner(case))) is None


def _moved(setting: Setting, tokens: int, names: list[tuple[str, str, str, str]]) -> list[tuple[float, float]]:
    """Bytes moved in training for each entry of the H maps, all and uncached, with images enough to exceed it."""
    cache_bytes = 2 * CPU_TILE_BYTES
    if torch.device(setting.device).type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(setting.device).L2_cache_size
    entries = setting.heads * tokens**2
    enough = cache_bytes // (DTYPES[setting.dtype].itemsize * entries) + 1
    images = max(setting.batch, min(enough, MOST_IMAGES))
    layer, found = Layer(replace(setting, batch=images), tokens), []
    for case, _, backend, save_for_backward in names:
        inputs = layer.leaves(case, images)
        moved = moved_bytes(partial(_train, layer, case, backend, save_for_backward, inputs), cache_bytes)
        found.append((moved.all / (images * entries), moved.uncached / (images * entries)))
    return found


def _errors(setting: Setting, tokens: int) -> dict[tuple[str, str], list[float]]:
    """Relative errors of output and gradients for each case and candidate, by root mean squares, against float64."""
    found = {}
    few = Setting(2, setting.heads, setting.width, setting.ratio, setting.device, setting.dtype)
    exact = Layer(Setting(2, setting.heads, setting.width, setting.ratio, setting.device), tokens).double()
    for case, backends in _candidates(Layer(few, tokens)).items():
        layer = Layer(few, tokens)
        inputs = layer.leaves(case, 2)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        truth = _train(exact, case, "eager", "auto", doubles)
        for label, backend, save_for_backward in backends:
            ours = _train(layer, case, backend, save_for_backward, inputs)
            pairs = zip(ours, truth, strict=True)
            found[case, label] = [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]
    return found


def measure(setting: Setting, tokens: int, rounds: int) -> list[Row]:
    """A row for every case and candidate at one number of tokens; all are timed in the same interleaved rounds."""
    device = torch.device(setting.device)
    layer, errors = Layer(setting, tokens), _errors(setting, tokens)
    names = [(case, *backend) for case, backends in _candidates(layer).items() for backend in backends]
    moved = _moved(setting, tokens, names)
    inputs = {case: layer.leaves(case, setting.batch) for case in CASES}
    seconds = [
        best_seconds(
            [
                partial(step, layer, case, backend, save_for_backward, inputs[case])
                for case, _, backend, save_for_backward in names
            ],
            rounds,
            device,
        )
        for step in (_train, _evaluate)
    ]
    rows = []
    for (case, label, backend, save_for_backward), (moved_entry, uncached_entry), training, evaluation in zip(
        names, moved, *seconds, strict=True
    ):
        one, two = (_save_for_backward(layer, case, backend, save_for_backward, images) for images in (1, 2))
        per_image = 1000 / setting.batch
        output, *gradients = errors[case, label]
        times, saved = (training * per_image, evaluation * per_image), (two - one) / MIB
        rows.append(Row(tokens, case, label, *times, saved, moved_entry, uncached_entry, output, max(gradients)))
    return rows + [_chosen(layer, case, rows) for case in ("linear", "bottleneck")]


def _chosen(layer: Layer, case: str, rows: list[Row]) -> Row:
    """The row that a run would choose for training; evaluation is the default's.

    A choice that has no row of its own, "triton[tall]" or "eager compiled", is its backend's, with the time at which it
    was chosen.
    """
    q_BHNd, k_BHNd, v_BHNd = layer.leaves("linear", 1)
    layer.train()
    device = v_BHNd.device
    kernels = device.type == "cuda" and attention.kernels_verified(device)
    asked = choice.Layer(
        case, DeferredMap(q_BHNd, k_BHNd, layer.scale), v_BHNd, layer.refiner(case), layer.scale, case == "bottleneck",
        layer.setting.batch, 1, "activations",
    )  # fmt: skip
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    with layer.setting.precision():
        measured = choice.measure(asked, free, CHOICE_SECONDS, kernels)
    mine = [row for row in rows if row.case == case]
    best = choice.best_of(measured)
    taken = next(row for row in mine if row.backend.startswith(choice.counted_as(best)))
    default = next(row for row in mine if row.backend.startswith(measured.candidates[0].backend))
    if best != choice.counted_as(best):
        chosen = next(one for one in measured.candidates if one.backend == best)
        taken = replace(taken, backend=best, training_ms=(chosen.milliseconds or 0.0) / measured.images)
    return replace(taken, backend=f"auto: {taken.backend}", evaluation_ms=default.evaluation_ms)


def table(rows: list[Row]) -> str:
    """The rows as text, time and memory with their ratios to eager for the same case and size."""
    columns = {
        "training ms": "training_ms",
        "evaluation ms": "evaluation_ms",
        "saved MiB/image": "saved_mib_image",
        "moved B/entry": "moved_entry",
    }
    header = f"{'tokens':>6}  {'case':<11}{'backend':<25}" + "".join(f"{title:>24}" for title in columns)
    lines = [header + f"{'uncached':>11}{'output error':>14}{'gradients':>11}"]
    for row in rows:
        unit = next((one for one in rows if (one.tokens, one.case) == (row.tokens, row.case)), row)
        cells = [(getattr(row, field), getattr(row, field) / getattr(unit, field)) for field in columns.values()]
        figures = "".join(f"{value:>14.2f} ({ratio:>5.2f} x)" for value, ratio in cells)
        errors = f"{row.uncached_entry:>11.1f}{row.output_error:>14.1e}{row.gradient_error:>11.1e}"
        lines.append(f"{row.tokens:>6}  {row.case:<11}{row.backend:<25}{figures}{errors}")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Memory saved and training time of an image against the number of tokens, one line a candidate, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    colours = {"linear": "tab:blue", "bottleneck": "tab:red", "attention": "tab:gray"}
    styles = {"eager": "--", "tiled, map": ":", "triton": "-.", "triton, activations": "-.", "triton, map": (0, (1, 3))}
    for panel, (field, label) in zip(
        panels,
        (("saved_mib_image", "saved for backward, MiB an image"), ("training_ms", "training, ms an image")),
        strict=True,
    ):
        for case, backends in CASES.items():
            for backend, _, _ in backends:
                points = [
                    (row.tokens, getattr(row, field)) for row in rows if (row.case, row.backend) == (case, backend)
                ]
                if not points:
                    continue
                name = f"{case}, {backend}" if case != "attention" else "no refiner, fused softmax"
                panel.plot(
                    *zip(*points, strict=True), styles.get(backend, "-"), marker="o", color=colours[case], label=name
                )
        panel.set(xlabel="tokens N", ylabel=label, xscale="log", yscale="log")
        sizes = sorted({row.tokens for row in rows})
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and draw; see the head of this file. Returns 0.

    Raises:
        ConfigError: an option cannot be.
    """
    parser = Parser(prog="python -m refiner_ds.benchmark attention", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 197, 577], help="tokens, class token included")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=32, help="of a head")
    parser.add_argument("--ratio", type=int, default=3, help="expanded maps a head")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the best of each candidate counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 runs under autocast")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw memory and time as a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args(argv)
    if min(given.batch, given.heads, given.width, given.ratio, given.rounds) < 1 or min(given.tokens) < 2:
        raise ConfigError("--batch, --heads, --width, --ratio and --rounds must be 1 or more, --tokens 2")
    if given.plot is not None and not given.plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {given.plot}: its folder does not exist")
    setting = Setting(given.batch, given.heads, given.width, given.ratio, given.device, given.dtype)
    on_cpu = torch.device(given.device).type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    rows = [row for tokens in sorted(set(given.tokens)) for row in measure(setting, tokens, given.rounds)]
    clock = "CPU time, one thread" if on_cpu else "elapsed time"
    title = (
        f"{setting.batch} images, {setting.heads} heads of {setting.width}, r = {setting.ratio}, {setting.dtype}, "
        f"{setting.device}, {clock}"
    )
    if given.plot is not None:
        draw(rows, given.plot, title)
    if given.json:
        print(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{title}; errors against float64\n{table(rows)}")
    return 0
