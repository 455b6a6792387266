"""Feature evolution: how similar each block's output is to the last block's, and to what the first block is given.

    python -m refiner_ds.analysis features runs/refined runs/plain timm:resnet50=resnet50.safetensors --data SET
    python -m refiner_ds.analysis features runs/refined --all-steps       every checkpoint kept: how they came to be

The paper's Figures 2 and 4. A block's feature is the mean of its output over patches (over positions, for a CNN), and
similarity is linear CKA over all images; see cka.py. Features that evolve fast are unlike the last block's for long.
Beside it, how alike the patches of one image are: 1 is over-smoothing. Writes features.csv and features.png.
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
from refiner_ds.analysis.loading import LoadedModel, every_checkpoint, load_model, open_set
from refiner_ds.analysis.map_statistics import token_similarity
from refiner_ds.analysis.results import legend_below, line_colors, new_figure, write_figure, write_table
from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError

__all__ = ["block_tokens", "feature_evolution", "main"]

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layer\d+)\.\d+$")  # timm's names: ViTs, ConvNeXt, Swin; ResNets
COLUMNS = ("model", "block", "depth", "cka_last", "cka_input", "images", "token_similarity")


def main(argv: list[str]) -> int:
    """Run the command; see the module for what it takes."""
    parser = Parser(prog="python -m refiner_ds.analysis features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folder, checkpoint, or timm:NAME[=WEIGHTS]")
    parser.add_argument("--data", metavar="SET", help="shard set (default: the run's refiner.data.val)")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="images of the set (2000)")
    parser.add_argument("--all-steps", action="store_true", help="every checkpoint that each run has kept")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a run")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="FOLDER", help="where results go")
    options = parser.parse_args(argv)
    rows = []
    specs = [one for spec in options.models for one in (every_checkpoint(spec) if options.all_steps else [spec])]
    for spec in specs:
        model = load_model(spec, options.weights)
        rows += feature_evolution(model, model.batches(open_set(model, options.data), options.images))
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, COLUMNS, options.out / "features.csv")
    draw(rows, options.out / "features.png")
    models = f"{len(specs)} model{'s' * (len(specs) > 1)}"
    print(f"{options.out}/features.csv and features.png: {models}, {rows[0]['images']} images")
    return 0


@torch.inference_mode()
def feature_evolution(loaded: LoadedModel, batches: Iterator[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """A row a block: its CKA with the last block and with the first block's input.

    Returns:
        Dicts with the keys ``COLUMNS``; ``depth`` is the block's number over that of the last, in (0, 1].
    """
    last: list[CKA] = []
    first: list[CKA] = []
    alike: list[float] = []
    for images_B3HW, _ in batches:
        input_BPD, outputs = block_tokens(loaded.model, images_B3HW)
        if not last:
            last, first, alike = [CKA() for _ in outputs], [CKA() for _ in outputs], [0.0] * len(outputs)
        for block, output_BPD in enumerate(outputs):
            last[block].update(output_BPD.mean(1), outputs[-1].mean(1))
            first[block].update(output_BPD.mean(1), input_BPD.mean(1))
            alike[block] += len(images_B3HW) * token_similarity(output_BPD)
    return [
        {
            "model": loaded.label, "block": block, "depth": (block + 1) / len(last), "images": with_last.samples,
            "cka_last": with_last.similarity(), "cka_input": with_first.similarity(),
            "token_similarity": alike[block] / with_last.samples,
        }
        for block, (with_last, with_first) in enumerate(zip(last, first, strict=True))
    ]  # fmt: skip


def block_tokens(model: nn.Module, images_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the first block is given, and what every block puts out, patch by patch (position by position): [B, P, D].

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

    def patches(x: Any) -> Tensor:
        x = x[0] if isinstance(x, tuple) else x
        if x.dim() == 4:
            return x.flatten(1, 2) if channels_last else x.flatten(2).mT
        return x[:, prefix:]

    return patches(inputs[0]), [patches(output) for output in outputs]


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
    """Three panels over relative depth: similarity with the last block, with the input, and of patches."""
    figure, axes = new_figure(columns=3, width=5.2)
    panels = {
        "cka_last": "linear CKA with the last block",
        "cka_input": "linear CKA with the input",
        "token_similarity": "cosine of two patches",
    }
    colors = line_colors(list(dict.fromkeys(row["model"] for row in rows)))
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        for label, color in colors.items():
            mine = [row for row in rows if row["model"] == label]
            places, values = [row["depth"] for row in mine], [row[key] for row in mine]
            axis.plot(places, values, marker="o", markersize=3, color=color, label=label)
        axis.set(xlabel="block / number of blocks", ylabel=title, ylim=(min(0, axis.get_ylim()[0]), 1.02))
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0])
    write_figure(figure, file)
