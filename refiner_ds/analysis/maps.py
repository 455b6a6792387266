"""What attention maps are like, before and after refining: numbers for every block, and a picture of chosen images.

    python -m refiner_ds.analysis maps runs/refined runs/plain --images 200
    python -m refiner_ds.analysis maps runs/refined --show 3 17 --blocks 9 11 --heads 0 5

The paper's Figure 5, for models of this package; timm's plain ViTs, which have one map a block, can stand beside them
(timm:deit_small_patch16_224=FILE). --all-steps shows how a run's maps came to be, checkpoint by checkpoint. Writes
maps.csv (a row a model, block and stage), maps.png (the numbers through depth) and for every model maps_<model>.png:
for each image shown, where its class token looks and the whole map, each before and after refining.
Axes: B batch, E maps, N tokens (class token first), P patches.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refiner_ds.analysis.loading import LoadedModel, every_checkpoint, load_model, open_set
from refiner_ds.analysis.map_statistics import (
    attention_distance,
    attention_entropy,
    head_similarity,
    token_similarity,
)
from refiner_ds.analysis.results import legend_below, line_colors, new_figure, write_figure, write_table
from refiner_ds.analysis.vit_maps import attention_maps, patch_grid, refuse_without_maps
from refiner_ds.command_line import Parser
from refiner_ds.errors import ConfigError
from refiner_ds.training.pictures import STAGES, draw_map_pair

__all__ = ["draw_maps", "main", "map_rows"]

NUMBERS = ("head_similarity", "entropy", "distance", "token_similarity")
COLUMNS = ("model", "block", "stage", *NUMBERS, "images")


def main(argv: list[str]) -> int:
    """Run the command; see the module for what it takes."""
    options = _parser().parse_args(argv)
    if options.images < 1:
        raise ConfigError(f"--images {options.images}: look at one image or more")
    specs = [one for spec in options.models for one in (every_checkpoint(spec) if options.all_steps else [spec])]
    models = [load_model(spec, options.weights) for spec in specs]
    for model in models:
        _refuse_missing(model, options)
    sets = [open_set(model, options.data) for model in models]
    shown = [number for number in options.show if number < min(index.count for index in sets)]
    if len(shown) < len(options.show):
        raise ConfigError(f"--show {max(options.show)}: the set holds {min(index.count for index in sets)} images")
    rows = []
    for model, index in zip(models, sets, strict=True):
        rows += map_rows(model, model.batches(index, options.images))
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, COLUMNS, options.out / "maps.csv")
    draw_numbers(rows, options.out / "maps.png")
    for model, index in zip(models, sets, strict=True):
        images = torch.cat([x for x, _ in model.batches(index, max(shown) + 1)])[shown]
        file = options.out / f"maps_{model.label.replace('/', '_')}.png"
        draw_maps(model, images, file, options.blocks, options.heads)
    print(f"{options.out}/maps.csv, maps.png and a picture a model: {rows[0]['images']} images")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m refiner_ds.analysis maps", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--data", metavar="SET", help="shard set (default: the run's refiner.data.val)")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="images the numbers are means over (200)")
    parser.add_argument("--show", type=int, nargs="+", default=[0, 1], metavar="I", help="images drawn, by number")
    parser.add_argument("--blocks", type=int, nargs="+", metavar="L", help="blocks drawn (default: the last refining)")
    parser.add_argument("--heads", type=int, nargs="+", metavar="H", help="maps drawn (default: the mean over heads)")
    parser.add_argument("--all-steps", action="store_true", help="every checkpoint that each run has kept")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a run")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="FOLDER", help="where results go")
    return parser


def _refuse_missing(loaded: LoadedModel, options: argparse.Namespace) -> None:
    refuse_without_maps(loaded.label, loaded.model)
    blocks: Any = loaded.model.blocks
    depth, heads = len(blocks), blocks[0].attn.num_heads
    for flag, given, count in (("blocks", options.blocks, depth), ("heads", options.heads, heads)):
        if given and not 0 <= min(given) <= max(given) < count:
            raise ConfigError(f"--{flag} {max(given)}: {loaded.label} has {count} {flag}, counted from 0")
    if min(options.show) < 0:
        raise ConfigError(f"--show {min(options.show)}: images are counted from 0")


@torch.inference_mode()
def map_rows(loaded: LoadedModel, batches: Iterator[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """A row a block and stage, with the keys ``COLUMNS``: means over images, and over maps.

    ``entropy`` is in nats, ``distance`` in patches; ``token_similarity`` is of the block's output patches.
    """
    model: Any = loaded.model
    grid = patch_grid(model)
    sums: dict[tuple[int, str], np.ndarray] = defaultdict(lambda: np.zeros(len(NUMBERS)))
    images = 0
    for images_B3HW, _ in batches:
        count = images_B3HW.shape[0]
        outputs = model.forward_intermediates(images_B3HW, output_fmt="NLC", intermediates_only=True)
        for stage in STAGES:
            for block, map_BENN in enumerate(attention_maps(model, images_B3HW, refined=stage == "after")):
                numbers = (
                    head_similarity(map_BENN),
                    float(attention_entropy(map_BENN).mean()),
                    float(attention_distance(map_BENN, grid).mean()),
                    token_similarity(outputs[block]),
                )
                sums[block, stage] += count * np.array(numbers)
        images += count
    return [
        {"model": loaded.label, "block": block, "stage": stage, "images": images}
        | dict(zip(NUMBERS, map(float, total / images), strict=True))
        for (block, stage), total in sorted(sums.items(), key=lambda item: (item[0][0], STAGES.index(item[0][1])))
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def draw_numbers(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel a number over blocks; dashed before refining, solid after."""
    figure, axes = new_figure(columns=len(NUMBERS), width=3.8, height=3.2)
    colors = line_colors(list(dict.fromkeys(row["model"] for row in rows)))
    for axis, key in zip(axes[0], NUMBERS, strict=True):
        for label, color in colors.items():
            for stage, line in zip(STAGES, ("--", "-"), strict=True):
                mine = [row for row in rows if row["model"] == label and row["stage"] == stage]
                values = [row[key] for row in mine]
                axis.plot([row["block"] for row in mine], values, line, color=color, label=f"{label}, {stage}")
        axis.set(xlabel="block", title=key.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0])
    write_figure(figure, file)


@torch.inference_mode()
def draw_maps(
    loaded: LoadedModel, images_B3HW: Tensor, file: Path, blocks: list[int] | None, heads: list[int] | None
) -> None:
    """A row an image and block: the image, then before and after refining, from the class token and the whole map."""
    grid = patch_grid(loaded.model)
    before, after = (attention_maps(loaded.model, images_B3HW, refined) for refined in (False, True))
    refining = [block for block, (one, other) in enumerate(zip(before, after, strict=True)) if not _same(one, other)]
    blocks = blocks or [refining[-1] if refining else len(after) - 1]
    chosen: list[int | None] = list(heads) if heads else [None]
    figure, axes = new_figure(len(images_B3HW) * len(blocks) * len(chosen), 5, width=2.2, height=2.2)
    places = [(i, block, head) for i in range(len(images_B3HW)) for block in blocks for head in chosen]
    for row, (i, block, head) in zip(axes, places, strict=True):
        pixels = images_B3HW[i] * torch.tensor(loaded.std)[:, None, None] + torch.tensor(loaded.mean)[:, None, None]
        row[0].imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy())
        row[0].set_title(f"block {block}, " + ("mean of heads" if head is None else f"head {head}"), fontsize=7)
        one, other = (maps[block][i].mean(0) if head is None else maps[block][i][head] for maps in (before, after))
        draw_map_pair(row[1:], one, other, grid)
        for column, name in enumerate(STAGES, start=1):
            row[column].set_title(f"class token, {name}", fontsize=7)
            row[column + 2].set_title(f"map, {name} refining", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    write_figure(figure, file)
