"""Receptive-field calibration: the crop ratio at which a trained model sees objects at the size it knows best.

The paper's test-time step ("receptive field calibration"), for CNNs and ViTs alike: how much of the image the crop
shows is tuned after training, with ratios above 1, where the image is made smaller than the crop and padded. Every
image is decoded once and seen at all ratios. The ratio is chosen on a held-out part of the set; the figures to report
are those of the rest, which had no say in it.

    <run>/evaluation/step_00000390_ema/     or --out FOLDER
      calibration.json     the choice, and figures at every ratio with their intervals
      calibration.csv      a row a ratio
      calibration.png      accuracy over the ratio

Axes: N images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.results import new_figure, write_figure, write_table
from refiner_ds.data.augment import EvalViews
from refiner_ds.errors import DataError
from refiner_ds.evaluation.command import Evaluator
from refiner_ds.evaluation.metrics import Z95, Answers, figures, hits
from refiner_ds.evaluation.sets import EvaluationSet
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import CALIBRATION

__all__ = ["RATIOS", "Sweep", "calibrate", "held_out", "paired_difference", "sweep", "write_calibration"]

RATIOS = tuple(round(0.70 + 0.05 * step, 2) for step in range(15))  # 0.7 to 1.4
COLUMNS = (
    "crop_ratio", "resized_side", "held_out_top1", "held_out_loss", "top1", "top1_low", "top1_high", "top5", "loss",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """What a model said of the images of a set at every ratio.

    Attributes:
        ratios: ascending; the model's own is among them.
        answers: by ratio.
        own: the ratio that the model is evaluated at otherwise.
    """

    ratios: tuple[float, ...]
    answers: list[Answers]
    own: float
    bad: int


def sweep(evaluator: Evaluator, data: EvaluationSet, ratios: Sequence[float]) -> Sweep:
    """Look at every image of a set at every ratio, decoding it once. Every rank must call it.

    Raises:
        DataError: a shard is missing or damaged, or no image can be read.
    """
    view = evaluator.loaded.view
    swept = tuple(sorted({*ratios, view.crop_ratio}))
    views = EvalViews(view.img_size, tuple(replace(view, crop_ratio=ratio) for ratio in swept))
    found = evaluator.predict(data, views)
    if not found.answers or not len(found.answers[0][0].samples_N):
        raise DataError(f"{data.index.folder}: none of its {data.index.count} images can be read")
    return Sweep(swept, [by_reading[0] for by_reading in found.answers], view.crop_ratio, found.bad)


def held_out(labels_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which images the ratio is chosen on, bool [N]: about ``share`` of every class, drawn from ``seed`` alone."""
    keys_N = np.random.default_rng(seed).random(len(labels_N))
    order_N = np.lexsort((keys_N, labels_N))
    steps_N = np.floor(share * np.arange(len(labels_N) + 1))
    chosen_N = np.zeros(len(labels_N), bool)
    chosen_N[order_N] = np.diff(steps_N) > 0
    return chosen_N


def paired_difference(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, tuple[float, float]]:
    """How much oftener ``one_N`` is right than ``other_N`` on the same images, in points, and its 95 % interval.

    The interval is that of Agresti and Min (2005) for matched pairs: half an image is added to each of the four cells.
    """
    count = len(one_N)
    gained, lost = int((one_N & ~other_N).sum()), int((~one_N & other_N).sum())
    adjusted = (gained - lost) / (count + 2)
    half = Z95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    low, high = max(-1.0, adjusted - half), min(1.0, adjusted + half)
    return 100 * (gained - lost) / max(count, 1), (100 * low, 100 * high)


def calibrate(found: Sweep, view_side: int, share: float, seed: int) -> dict[str, Any]:
    """Choose a ratio on the held-out part and say what it does on the rest.

    The one with most images right; of several, the one with the lowest loss, then the one nearest the model's own. It
    has to be better than the model's own by more than one standard error of the difference, or that one stands: the
    best of many ratios on few images is mostly luck.

    Raises:
        DataError: either part would be empty.
    """
    chosen_N = held_out(found.answers[0].labels_N, share, seed)
    if chosen_N.all() or not chosen_N.any():
        raise DataError(
            f"--held-out {share:g}: leaves {int(chosen_N.sum())} of {len(chosen_N)} images to choose on"
            f" and {int((~chosen_N).sum())} to report; give a set with more"
        )
    rows = []
    for ratio, answers in zip(found.ratios, found.answers, strict=True):
        tuning, rest = figures(answers[chosen_N]), figures(answers[~chosen_N])
        low, high = rest["top1_interval"]
        rows.append(
            {
                "crop_ratio": ratio, "resized_side": math.floor(view_side / ratio),
                "held_out_top1": tuning["top1"], "held_out_loss": tuning["loss"],
                "top1": rest["top1"], "top1_low": low, "top1_high": high, "top5": rest["top5"], "loss": rest["loss"],
            }
        )  # fmt: skip
    best = min(
        range(len(rows)),
        key=lambda n: (-rows[n]["held_out_top1"], rows[n]["held_out_loss"], abs(found.ratios[n] - found.own)),
    )
    own, leading = found.ratios.index(found.own), found.ratios[best]
    tuned, before = (hits(found.answers[number][chosen_N])[0] for number in (best, own))
    if int(tuned.sum()) - int(before.sum()) <= math.sqrt(int((tuned != before).sum())):
        best = own
    right = [hits(found.answers[number][~chosen_N])[0] for number in (best, own)]
    difference, interval = paired_difference(*right)
    return {
        "crop_ratio": found.ratios[best], "own_crop_ratio": found.own, "best_held_out": leading,
        "held_out_images": int(chosen_N.sum()), "images": int((~chosen_N).sum()), "bad_samples": found.bad,
        "chosen": rows[best], "own": rows[own], "difference": difference, "difference_interval": interval,
        "held_out_share": share, "seed": seed, "ratios": rows,
    }  # fmt: skip


def write_calibration(folder: Path, loaded: LoadedModel, result: dict[str, Any]) -> None:
    """Write the three files; the JSON, which exports read, last."""
    write_table(result["ratios"], COLUMNS, folder / "calibration.csv")
    draw(loaded.label, result, folder / "calibration.png")
    write_atomically(folder / CALIBRATION, json.dumps(result, indent=1) + "\n")


def draw(label: str, result: dict[str, Any], file: Path) -> None:
    """Top-1 over the crop ratio: of the held-out part, and of the rest with its 95 % interval."""
    figure, ((axis,),) = new_figure(width=7.0, height=4.4)
    rows = result["ratios"]
    ratios, top1 = [row["crop_ratio"] for row in rows], [row["top1"] for row in rows]
    lows, highs = [row["top1_low"] for row in rows], [row["top1_high"] for row in rows]
    axis.fill_between(ratios, lows, highs, color="C0", alpha=0.18, linewidth=0, label="95 % interval")
    axis.plot(ratios, top1, "o-", ms=4, color="C0", label=f"reported: the other {result['images']:,} images")
    held = f"held out to choose on: {result['held_out_images']:,} images"
    axis.plot(ratios, [row["held_out_top1"] for row in rows], "s--", ms=3.5, lw=1, color="C7", label=held)
    axis.axvline(result["own_crop_ratio"], color="C7", lw=1, ls=":", label=f"its own: {result['own_crop_ratio']:g}")
    axis.axvline(result["crop_ratio"], color="C3", lw=1.2, label=f"chosen: {result['crop_ratio']:g}")
    if ratios[-1] > 1:
        axis.axvspan(1, ratios[-1], color="0.5", alpha=0.07, linewidth=0)
        axis.annotate("padded", (1, 1), (4, -12), xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=8, color="0.35")  # fmt: skip
    axis.set(xlabel="crop ratio (crop over resized short side)", ylabel="top-1, %", title=f"{label} on {result['set']}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_figure(figure, file)
