"""Cost of refining: a released model under every backend, beside a vanilla ViT of its size and timm's DeiT.

    python -m refiner_ds.benchmark model [--model refiner_vit_s] [--batch 4] [--device cuda --dtype bf16] [--compile]

    eager                   every map materialised
    tiled, triton           the same numbers without saving expanded maps; triton where there is a GPU
    …, compiled             with --compile each under torch.compile, which sees tiled and triton as operators
    vanilla ViT             the same depth and width without refiners, PyTorch's fused attention
    timm DeiT-S             beside the small model

It prints milliseconds an image and memory a step, each as a ratio to the vanilla ViT, and how much faster than eager a
training step is. ``--largest 130`` finds the largest batch that trains within so many GiB of a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds import attention
from refiner_ds.attention.compiling import keep_code_by_cpu
from refiner_ds.benchmark.measure import best_seconds, peak_bytes, saved_bytes
from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError

__all__ = ["Row", "main", "measure"]

BASELINE, EAGER = "vanilla ViT", "eager"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """A model of timm's registry, the backend of its attention, and whether it is compiled."""

    label: str
    model: str
    backend: str = EAGER
    refiner: str | None = None
    compiled: bool = False


@dataclass
class Row:
    """One contender's figures: milliseconds an image, and MiB.

    ``saved_mib_image`` is what one more image saves for backward, ``peak_mib`` the most that a first training step
    takes beside the weights: activations, gradients and workspace. ``largest`` is the largest batch that fits.
    """

    model: str
    parameters: int
    forward_ms: float
    training_ms: float
    saved_mib_image: float
    peak_mib: float
    largest: int | None = None


@dataclass(frozen=True)
class Setting:
    """What is measured: a model, images a step and their size in pixels, where, how precisely (bf16 is autocast)."""

    model: str
    batch: int
    img_size: int
    device: str
    dtype: str
    depth: int | None = None
    compile: bool = False

    def contenders(self) -> list[Contender]:
        """Everything that can run on the device."""
        backends = [backend for backend in ("eager", "tiled", "triton") if self._runs(backend)]
        found = [Contender(backend, self.model, backend) for backend in backends]
        found.append(Contender(BASELINE, self.model, refiner="none"))
        if self.compile:
            found += [replace(one, label=f"{one.label}, compiled", compiled=True) for one in found]
        if self.model == "refiner_vit_s":
            found.append(Contender("timm DeiT-S", "deit_small_patch16_224"))
        return found

    def _runs(self, backend: str) -> bool:
        try:
            return attention.resolve_backend(backend, torch.device(self.device)) == backend
        except ValueError:
            return False

    def make(self, contender: Contender) -> nn.Module:
        """Its model, on the device."""
        torch.manual_seed(0)
        given: dict[str, Any] = {"depth": self.depth, "refiner": contender.refiner}
        options = {key: value for key, value in given.items() if value is not None}
        model = timm.create_model(contender.model, img_size=self.img_size, **options).to(self.device)
        return cast(nn.Module, torch.compile(model)) if contender.compiled else model

    def images(self, count: int) -> Tensor:
        """Noise."""
        return torch.randn(count, 3, self.img_size, self.img_size, device=self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast for bf16."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16")


def _loss(setting: Setting, contender: Contender, model: nn.Module, images: Tensor) -> Tensor:
    with setting.precision(), attention.attention_backend(contender.backend):
        out = model.train()(images)
    logits = [part for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, Tensor)]
    return torch.stack([part.float().logsumexp(-1).mean() for part in logits]).sum()


def _train(setting: Setting, contender: Contender, model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    _loss(setting, contender, model, images).backward()


@torch.no_grad()
def _forward(setting: Setting, contender: Contender, model: nn.Module, images: Tensor) -> Tensor:
    with setting.precision(), attention.attention_backend(contender.backend):
        return model.eval()(images)


def _peak(setting: Setting, contender: Contender) -> int:
    torch.set_num_threads(1)
    model = setting.make(contender)
    step = partial(_train, setting, contender, model, setting.images(setting.batch))
    return peak_bytes(step, torch.device(setting.device))


def _largest(setting: Setting, contender: Contender, gib: float) -> int:
    """The largest batch of images whose training step stays within ``gib`` of the GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    model = setting.make(contender)

    def fits(count: int) -> bool:
        try:
            _train(setting, contender, model, setting.images(count))
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
        return True

    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 if none does: doubled until it does not, then halved in between to 1 in 16."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure(setting: Setting, rounds: int, gib: float | None = None) -> list[Row]:
    """A row a contender, measured in interleaved rounds; each peak, and largest batch, in a process of its own."""
    device, contenders = torch.device(setting.device), setting.contenders()
    made = [(contender, setting.make(contender)) for contender in contenders]
    images = setting.images(setting.batch)
    forward, training = (
        best_seconds([partial(step, setting, *one, images) for one in made], rounds, device)
        for step in (_forward, _train)
    )
    rows = []
    # Forked children would inherit torch's threads in whatever state they are.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for index, (contender, model) in enumerate(made):
            one, two = (
                saved_bytes(partial(_loss, setting, contender, model, setting.images(count)), model) for count in (1, 2)
            )
            per_image = 1000 / setting.batch
            rows.append(
                Row(
                    contender.label,
                    sum(parameter.numel() for parameter in model.parameters()),
                    forward[index] * per_image,
                    training[index] * per_image,
                    (two - one) / MIB,
                    fresh.apply(_peak, (setting, contender)) / MIB,
                    None if gib is None else fresh.apply(_largest, (setting, contender, gib)),
                )
            )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text, every figure with its ratio to the vanilla ViT."""
    baseline, eager = (next(row for row in rows if row.model == name) for name in (BASELINE, EAGER))
    columns = {
        "forward ms/image": "forward_ms",
        "training ms/image": "training_ms",
        "saved MiB/image": "saved_mib_image",
        "peak MiB/step": "peak_mib",
    }
    header = f"{'':<22}{'parameters':>12}" + "".join(f"{title:>26}" for title in columns)
    lines = [
        header + f"{'training faster':>18}{'forward':>10}" + ("" if baseline.largest is None else f"{'largest':>9}")
    ]
    for row in rows:
        cells = [(getattr(row, field), getattr(row, field) / getattr(baseline, field)) for field in columns.values()]
        figures = "".join(f"{value:>16.2f} ({ratio:>5.2f} x)" for value, ratio in cells)
        faster = f"{eager.training_ms / row.training_ms:>17.2f}x{eager.forward_ms / row.forward_ms:>9.2f}x"
        batch = "" if row.largest is None else f"{row.largest:>9}"
        lines.append(f"{row.model:<22}{row.parameters:>12,}{figures}{faster}{batch}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file. Returns 0.

    Raises:
        ConfigError: an option cannot be.
    """
    parser = Parser(prog="python -m refiner_ds.benchmark model", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[f"refiner_vit_{size}" for size in "sml"], default="refiner_vit_s")
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--img-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the best of each model counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 runs under autocast")
    parser.add_argument("--depth", type=int, help="blocks, if not each model's own")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile, which takes minutes")
    parser.add_argument("--largest", type=float, metavar="GIB", help="also find the largest batch that fits")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    setting = Setting(
        options.model, options.batch, options.img_size, options.device, options.dtype, options.depth, options.compile
    )
    if options.largest is not None and torch.device(options.device).type != "cuda":
        raise ConfigError("--largest measures the memory of a GPU; leave it out, or give --device cuda")
    if options.batch < 1 or options.rounds < 1:
        raise ConfigError("--batch and --rounds must be 1 or more")
    keep_code_by_cpu()
    if torch.device(options.device).type == "cpu":
        torch.set_num_threads(1)
    try:
        rows = measure(setting, options.rounds, options.largest)
    except ValueError as refusal:  # a model says what is wrong with its size or depth
        raise ConfigError(str(refusal)) from None
    if options.json:
        print(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}))
    else:
        clock = "elapsed time" if torch.device(options.device).type == "cuda" else "CPU time, one thread"
        images = f"{setting.batch} images of {setting.img_size} px"
        print(f"{setting.model}, {images}, {setting.dtype}, {setting.device}, {clock}")
        print("(x): over the vanilla ViT; faster: than eager")
        print(table(rows))
    return 0
