"""What refiners have learned: local kernels and head mixing of every block, at one checkpoint or all of a run's.

    python -m refiner_ds.analysis weights runs/mine                   the latest checkpoint
    python -m refiner_ds.analysis weights runs/mine --all-steps       every checkpoint kept: how they came to be

Writes refiner_weights.csv (a row a checkpoint and block), refiner_weights.png (the numbers through depth, a line a
checkpoint), kernels.png (the newest checkpoint's kernels and mixing matrices) and, of several checkpoints,
kernels_by_step.png (the same of the first and the last refining block, step by step).
Axes: H heads, E expanded maps, k×k a kernel.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refiner_ds.analysis.results import legend_below, new_figure, write_figure, write_table
from refiner_ds.attention.equations import compose_kernel
from refiner_ds.checkpoint.files import find_checkpoint, integrity_errors, read_weights
from refiner_ds.command_line import Parser
from refiner_ds.errors import CheckpointError
from refiner_ds.run_folder import RunFolder, read_state

KERNEL = re.compile(r"blocks\.(\d+)\.attn\.(?:DLA|refiner)\.depth_sep_conv\.weight")
COLUMNS = ("step", "block", "centre_share", "head_mixing", "kernel_norm")
MOST_BLOCKS = 6  # drawn


class BlockWeights(NamedTuple):
    """One refiner's convolutions: expand [E, H], kernels [E, k, k], reduce [H, E]."""

    block: int
    expand_EH: Tensor
    kernel_Ekk: Tensor
    reduce_HE: Tensor


def main(argv: list[str]) -> int:
    """Run the command; see the module for what it takes."""
    parser = Parser(prog="python -m refiner_ds.analysis weights", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--all-steps", action="store_true", help="every checkpoint the run has kept")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="FOLDER", help="where results go")
    options = parser.parse_args(argv)
    newest = find_checkpoint(options.run)
    saved = RunFolder(newest.parents[1]).saved_checkpoints() if options.all_steps else [newest]
    rows: list[dict[str, Any]] = []
    by_step: dict[int, list[BlockWeights]] = {}
    for checkpoint in saved:
        if checkpoint != newest and integrity_errors(checkpoint):
            continue
        weights = refiner_weights(read_weights(checkpoint, options.weights))
        if not weights:
            raise CheckpointError(f"{checkpoint}: its model has no refiner with one kernel over the whole map")
        by_step[step := read_state(checkpoint).step] = weights
        rows += summaries(weights, step)
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, COLUMNS, options.out / "refiner_weights.csv")
    draw_summaries(rows, options.out / "refiner_weights.png")
    draw_weights(weights, options.out / "kernels.png")
    if len(by_step) > 1:
        draw_training(by_step, options.out / "kernels_by_step.png")
    print(
        f"{options.out}/refiner_weights.csv, refiner_weights.png and kernels.png: {len(weights)} refining blocks,"
        f" checkpoints of {len(by_step)} steps"
    )
    return 0


def refiner_weights(state: Mapping[str, Tensor]) -> list[BlockWeights]:
    """The refiners in a state dict, in order of blocks; without expansion or reduction those are the identity."""
    found = []
    for name, kernel in state.items():
        if (match := KERNEL.fullmatch(name)) is None:
            continue
        prefix = name.removesuffix("depth_sep_conv.weight")
        identity = torch.eye(kernel.shape[0])
        expand, reduce = (state.get(f"{prefix}{conv}.weight") for conv in ("conv_exp", "conv_pro"))
        expand_EH = identity if expand is None else expand.flatten(1).float()
        reduce_HE = identity if reduce is None else reduce.flatten(1).float()
        found.append(BlockWeights(int(match[1]), expand_EH, kernel.squeeze(1).float(), reduce_HE))
    return sorted(found, key=lambda weights: weights.block)


def summaries(weights: list[BlockWeights], step: int) -> list[dict[str, Any]]:
    """A row a block.

    ``centre_share``: magnitude of the kernels' centre taps over that of all taps; 1: no local aggregation.
    ``head_mixing``: magnitude of the composed kernel W[o, i] between different heads over all of it; 0: heads keep to
    themselves. (Of a bottleneck, its linear part.)
    ``kernel_norm``: root mean square of the taps.
    """
    rows = []
    for block, expand_EH, kernel_Ekk, reduce_HE in weights:
        size, k = kernel_Ekk.abs(), kernel_Ekk.shape[-1]
        composed_HH = composed(BlockWeights(block, expand_EH, kernel_Ekk, reduce_HE))
        # Without reduction there are r maps a head, one head's after the other's.
        heads = composed_HH.shape[1]
        same = composed_HH.unflatten(0, (heads, -1)).diagonal(dim1=0, dim2=2).sum()
        rows.append(
            {
                "step": step,
                "block": block,
                "centre_share": float(size[:, k // 2, k // 2].sum() / size.sum().clamp_min(1e-30)),
                "head_mixing": float(1 - same / composed_HH.sum().clamp_min(1e-30)),
                "kernel_norm": float(kernel_Ekk.square().mean().sqrt()),
            }
        )
    return rows


def composed(weights: BlockWeights) -> Tensor:
    """How much of head i goes into refined map o: magnitude of the composed kernel over its taps, [H or E, H]."""
    return compose_kernel(weights.expand_EH, weights.kernel_Ekk[:, None], weights.reduce_HE).abs().sum((2, 3))


def draw_summaries(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel a number, blocks from left to right, one line a checkpoint, the newest darkest."""
    figure, axes = new_figure(columns=3, width=4.2, height=3.2)
    steps = sorted({row["step"] for row in rows})
    for axis, key in zip(axes[0], COLUMNS[2:], strict=True):
        for index, step in enumerate(steps):
            mine = [row for row in rows if row["step"] == step]
            shade = 0.25 + 0.75 * (index + 1) / len(steps)
            blocks, values = [row["block"] for row in mine], [row[key] for row in mine]
            axis.plot(blocks, values, "o-", ms=3, color=(0, 0.3, 0.6, shade), label=f"step {step}")
        axis.set(xlabel="block", title=key.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0])
    write_figure(figure, file)


def draw_weights(weights: list[BlockWeights], file: Path) -> None:
    """A row a block: kernels side by side, expansion, reduction and how heads mix; red is positive, blue negative."""
    places = np.linspace(0, len(weights) - 1, min(len(weights), MOST_BLOCKS))
    chosen = [weights[index] for index in sorted({round(place) for place in places})]
    figure, axes = new_figure(len(chosen), 4, width=3.4, height=2.6)
    for row, one in zip(axes, chosen, strict=True):
        panels = {
            f"block {one.block}: kernels": _tiled(one.kernel_Ekk), "expand [E, H]": one.expand_EH,
            "reduce [H, E]": one.reduce_HE, "head mixing [H, H]": composed(one),
        }  # fmt: skip
        for axis, (title, values) in zip(row, panels.items(), strict=True):
            _draw_matrix(figure, axis, np.asarray(values), title)
        row[0].set_axis_off()
    write_figure(figure, file)


def draw_training(by_step: dict[int, list[BlockWeights]], file: Path) -> None:
    """Kernels and head mixing of the first and the last refining block, a column a checkpoint (eight at most)."""
    steps = sorted(by_step)
    steps = [steps[index] for index in sorted({round(p) for p in np.linspace(0, len(steps) - 1, min(len(steps), 8))})]
    ends = sorted({0, len(by_step[steps[0]]) - 1})
    figure, axes = new_figure(2 * len(ends), len(steps), width=2.6, height=2.4)
    for column, step in enumerate(steps):
        for row, end in enumerate(ends):
            one = by_step[step][end]
            kernels, mixing = axes[2 * row : 2 * row + 2, column]
            _draw_matrix(figure, kernels, _tiled(one.kernel_Ekk), f"step {step}, block {one.block}: kernels")
            kernels.set_axis_off()
            _draw_matrix(figure, mixing, np.asarray(composed(one)), "head mixing [H, H]")
    write_figure(figure, file)


def _draw_matrix(figure: Any, axis: Any, values: np.ndarray, title: str) -> None:
    limit = float(np.nanmax(np.abs(values))) or 1.0
    shape = "auto" if "[" in title else "equal"
    picture = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect=shape)
    axis.set_title(title, fontsize=7)
    axis.tick_params(labelsize=6)
    figure.colorbar(picture, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)


def _tiled(kernel_Ekk: Tensor) -> np.ndarray:
    """All kernels in a near-square arrangement, an empty line between neighbours."""
    maps, k, _ = kernel_Ekk.shape
    columns = max(1, int(np.ceil(maps**0.5)))
    rows = -(-maps // columns)
    sheet = np.full((rows * (k + 1) - 1, columns * (k + 1) - 1), np.nan)
    for index, kernel in enumerate(kernel_Ekk.numpy()):
        top, left = index // columns * (k + 1), index % columns * (k + 1)
        sheet[top : top + k, left : left + k] = kernel
    return sheet
