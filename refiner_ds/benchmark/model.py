"""What refining costs: released S beside its plain twin and timm's DeiT-S, in one run.

    python -m refiner_ds.benchmark model [--batch 4] [--rounds 3] [--device cuda --dtype bf16]

prints milliseconds an image, memory a step, and each as a ratio to the plain twin.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds.benchmark.measure import best_seconds, kept_bytes, peak_bytes
from refiner_ds.errors import ConfigError

__all__ = ["Row", "main", "measure"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "released S": partial(timm.create_model, "refiner_vit_s"),
    "plain twin": partial(timm.create_model, "refiner_vit_s", refiner="none"),
    "timm DeiT-S": partial(timm.create_model, "deit_small_patch16_224"),
}
UNIT = "plain twin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


@dataclass
class Row:
    """One model's figures: milliseconds an image, and MiB.

    ``kept_mib_image`` is what one more image keeps for backward, ``peak_mib`` the most a first training step takes
    beside the weights: activations, gradients and workspace.
    """

    model: str
    parameters: int
    forward_ms: float
    training_ms: float
    kept_mib_image: float
    peak_mib: float


@dataclass(frozen=True)
class Setting:
    """What is measured: images a step, their size in pixels, where, and in which precision (bf16 is autocast)."""

    batch: int
    img_size: int
    device: str
    dtype: str
    depth: int | None = None

    def model(self, name: str) -> nn.Module:
        """One of :data:`MODELS`, on the device."""
        torch.manual_seed(0)
        depth = {} if self.depth is None else {"depth": self.depth}
        return MODELS[name](img_size=self.img_size, **depth).to(self.device)

    def images(self, count: int) -> Tensor:
        """Noise."""
        return torch.randn(count, 3, self.img_size, self.img_size, device=self.device)

    def precision(self) -> AbstractContextManager:
        """Autocast, when asked for."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bf16")


def _loss(setting: Setting, model: nn.Module, images: Tensor) -> Tensor:
    with setting.precision():
        out = model.train()(images)
    logits = [part for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, Tensor)]
    return torch.stack([part.float().logsumexp(-1).mean() for part in logits]).sum()


def _train(setting: Setting, model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    _loss(setting, model, images).backward()


@torch.no_grad()
def _forward(setting: Setting, model: nn.Module, images: Tensor) -> Tensor:
    with setting.precision():
        return model.eval()(images)


def _peak(setting: Setting, name: str) -> int:
    torch.set_num_threads(1)
    model = setting.model(name)
    return peak_bytes(partial(_train, setting, model, setting.images(setting.batch)), torch.device(setting.device))


def measure(setting: Setting, rounds: int) -> list[Row]:
    """A row a model, measured in interleaved rounds; each peak in a process of its own."""
    device = torch.device(setting.device)
    models = {name: setting.model(name) for name in MODELS}
    images = setting.images(setting.batch)
    forward = best_seconds([partial(_forward, setting, model, images) for model in models.values()], rounds, device)
    training = best_seconds([partial(_train, setting, model, images) for model in models.values()], rounds, device)
    rows = []
    # Forked children would inherit torch's threads in whatever state they are.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for index, (name, model) in enumerate(models.items()):
            one, two = (kept_bytes(partial(_loss, setting, model, setting.images(count)), model) for count in (1, 2))
            per_image = 1000 / setting.batch
            rows.append(
                Row(
                    name,
                    sum(parameter.numel() for parameter in model.parameters()),
                    forward[index] * per_image,
                    training[index] * per_image,
                    (two - one) / MIB,
                    fresh.apply(_peak, (setting, name)) / MIB,
                )
            )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text, every figure with its ratio to the plain twin."""
    unit = next(row for row in rows if row.model == UNIT)
    columns = {
        "forward ms/image": "forward_ms",
        "training ms/image": "training_ms",
        "kept MiB/image": "kept_mib_image",
        "peak MiB/step": "peak_mib",
    }
    lines = [f"{'model':<14}{'parameters':>12}" + "".join(f"{title:>26}" for title in columns)]
    for row in rows:
        cells = [(getattr(row, field), getattr(row, field) / getattr(unit, field)) for field in columns.values()]
        figures = "".join(f"{value:>16.2f} ({ratio:>5.2f} x)" for value, ratio in cells)
        lines.append(f"{row.model:<14}{row.parameters:>12,}" + figures)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file. Returns 0.

    Raises:
        ConfigError: an option cannot be.
    """
    parser = argparse.ArgumentParser(prog="python -m refiner_ds.benchmark model", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--img-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the best of each model counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 runs under autocast")
    parser.add_argument("--depth", type=int, help="blocks, if not each model's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    setting = Setting(options.batch, options.img_size, options.device, options.dtype, options.depth)
    if options.batch < 1 or options.rounds < 1:
        raise ConfigError("--batch and --rounds must be 1 or more")
    if torch.device(options.device).type == "cpu":
        torch.set_num_threads(1)
    try:
        rows = measure(setting, options.rounds)
    except ValueError as refusal:  # a model says what is wrong with its size or depth
        raise ConfigError(str(refusal)) from None
    if options.json:
        print(json.dumps({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}))
    else:
        clock = "elapsed time" if torch.device(options.device).type == "cuda" else "CPU time, one thread"
        print(f"{setting.batch} images of {setting.img_size} px, {setting.dtype}, {setting.device}, {clock}")
        print(table(rows))
    return 0
