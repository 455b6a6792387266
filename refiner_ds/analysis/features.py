"""Feature evolution: how similar each block's output is to the last block's, and to what the first block is given.

    python -m refiner_ds.analysis features runs/refined runs/plain timm:resnet50=resnet50.safetensors --data SET

The paper's Figures 2 and 4. A block's feature is the mean of its output over patches (over positions, for a CNN), and
similarity is linear CKA over all images; see cka.py. Features that evolve fast are unlike the last block's for long.
Writes features.csv and features.png.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refiner_ds.analysis.cka import CKA
from refiner_ds.analysis.loading import LoadedModel, load_model, open_set
from refiner_ds.analysis.results import new_figure, write_figure, write_table
from refiner_ds.errors import ConfigError

__all__ = ["block_features", "feature_evolution", "main"]

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layer\d+)\.\d+$")  # timm's names: ViTs, ConvNeXt, Swin; ResNets
COLUMNS = ("model", "block", "depth", "cka_last", "cka_input", "images")


def main(argv: list[str]) -> int:
    """Run the command; see the module for what it takes."""
    parser = argparse.ArgumentParser(prog="python -m refiner_ds.analysis features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folder, checkpoint, or timm:NAME[=WEIGHTS]")
    parser.add_argument("--data", metavar="SET", help="shard set (default: the run's refiner.data.val)")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="images of the set (2000)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a run")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="FOLDER", help="where results go")
    options = parser.parse_args(argv)
    rows = []
    for spec in options.models:
        model = load_model(spec, options.weights)
        rows += feature_evolution(model, model.batches(open_set(model, options.data), options.images))
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, COLUMNS, options.out / "features.csv")
    draw(rows, options.out / "features.png")
    print(f"{options.out}/features.csv and features.png: {len(options.models)} models, {rows[0]['images']} images")
    return 0


@torch.inference_mode()
def feature_evolution(loaded: LoadedModel, batches: Iterator[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """A row a block: its CKA with the last block and with the first block's input.

    Returns:
        Dicts with the keys ``COLUMNS``; ``depth`` is the block's number over that of the last, in (0, 1].
    """
    last: list[CKA] = []
    first: list[CKA] = []
    for images_B3HW, _ in batches:
        input_BD, outputs = block_features(loaded.model, images_B3HW)
        last, first = last or [CKA() for _ in outputs], first or [CKA() for _ in outputs]
        for block, output_BD in enumerate(outputs):
            last[block].update(output_BD, outputs[-1])
            first[block].update(output_BD, input_BD)
    return [
        {
            "model": loaded.label, "block": block, "depth": (block + 1) / len(last), "images": with_last.samples,
            "cka_last": with_last.similarity(), "cka_input": with_first.similarity(),
        }
        for block, (with_last, with_first) in enumerate(zip(last, first, strict=True))
    ]  # fmt: skip


def block_features(model: nn.Module, images_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the first block is given, and what every block puts out, each averaged over patches: [B, D].

    Raises:
        ConfigError: the model has no blocks under the names timm gives them.
    """
    blocks = [module for name, module in model.named_modules() if BLOCK.search(name)]
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no modules named blocks.N or layerN.N to look into")
    with _recorded(blocks) as (inputs, outputs):
        model(images_B3HW)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    prefix = int(getattr(model, "num_prefix_tokens", 1))

    def mean_over_patches(x: Any) -> Tensor:
        x = x[0] if isinstance(x, tuple) else x
        if x.dim() == 4:
            return x.mean((1, 2) if channels_last else (2, 3))
        return x[:, prefix:].mean(1)

    return mean_over_patches(inputs[0]), [mean_over_patches(output) for output in outputs]


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[tuple[list[Any], list[Any]]]:
    inputs: list[Any] = []
    outputs: list[Any] = []
    handles = [blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))]
    handles += [block.register_forward_hook(lambda module, args, out: outputs.append(out)) for block in blocks]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Two panels over relative depth: similarity with the last block, and with the input."""
    figure, axes = new_figure(columns=2)
    for axis, key, title in zip(axes[0], ("cka_last", "cka_input"), ("the last block", "the input"), strict=True):
        for label in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == label]
            axis.plot([row["depth"] for row in mine], [row[key] for row in mine], marker="o", markersize=3, label=label)
        axis.set(
            xlabel="block / number of blocks",
            ylabel=f"linear CKA with {title}",
            ylim=(min(0, axis.get_ylim()[0]), 1.02),
        )
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    write_figure(figure, file)
