"""Where an evaluation's results go, and what they look like.

<run>/evaluation/step_00000390_ema/      or --out FOLDER; a size or crop of one's own is added to the name
  imagenet.json              every figure, with confidence bins and most confused classes
  imagenet_classes.csv       a row a class
  results-imagenet.csv       one row, in the columns of timm's own results files
  imagenet-c.json, .csv      errors by corruption and severity
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.results import write_table
from refiner_ds.errors import ConfigError
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder

__all__ = ["TIMM_COLUMNS", "make_folder", "results_folder", "timm_row", "write_results"]

TIMM_COLUMNS = (
    "model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation",
)  # fmt: skip
CLASS_COLUMNS = (
    "class", "images", "right", "top1", "top1_low", "top1_high", "top5", "confidence", "taken_for", "taken_for_images",
)  # fmt: skip
CORRUPTION_COLUMNS = ("corruption", "severity", "top1", "top1_err", "top5", "top5_err", "images")


def results_folder(loaded: LoadedModel, weights: str, crop_ratio: float | None, test_size: int | None) -> Path | None:
    """Where in its run folder a model's results belong; None for a model that is in none.

    Args:
        crop_ratio, test_size: asked for instead of the run's own.
    """
    if loaded.checkpoint is None or loaded.run is None or loaded.step is None:
        return None
    run = RunFolder(loaded.checkpoint.parents[1])
    if run.checkpoint(loaded.step) != loaded.checkpoint or not run.config.is_file():
        return None
    folder = run.results(loaded.step, weights)
    name = folder.name
    if test_size is not None and test_size != loaded.run.refiner.model.img_size:
        name += f"_{test_size}px"
    if crop_ratio is not None and crop_ratio != loaded.run.refiner.data.eval_crop_ratio:
        name += f"_crop{crop_ratio:g}"
    return folder.with_name(name)


def make_folder(folder: Path) -> None:
    """Make a folder for results, before anything is computed. Raises ConfigError where it cannot be written."""
    RunFolder(folder).refuse_unwritable()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); give --out FOLDER") from None


def parameters(model: nn.Module) -> float:
    """Parameters in millions, as timm counts them: all, trained or not."""
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)


def timm_row(loaded: LoadedModel, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `TIMM_COLUMNS`, rounded as timm's validate.py rounds."""
    top1, top5 = round(figures["top1"], 4), round(figures["top5"], 4)
    return {
        "model": loaded.label, "top1": top1, "top1_err": round(100 - top1, 4), "top5": top5,
        "top5_err": round(100 - top5, 4), "param_count": parameters(loaded.model),
        "img_size": loaded.view.img_size, "crop_pct": loaded.view.crop_ratio,
        "interpolation": loaded.view.interpolation,
    }  # fmt: skip


def write_results(
    folder: Path, loaded: LoadedModel, result: Mapping[str, Any], class_rows: list[dict[str, Any]] | None
) -> None:
    """Write the files of one set.

    Args:
        result: what the command prints with --json: figures under their names, and what they are of.
        class_rows: of `metrics.class_rows`; None for a set whose labels are not single classes.
    """
    name = result["set"]
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if "corruptions" in result:
        rows = [
            {"corruption": corruption, "severity": severity, "images": result["images"], **{
                column: values[column] for column in ("top1", "top1_err", "top5", "top5_err")}}
            for corruption, by_severity in result["by_severity"].items()
            for severity, values in by_severity.items()
        ]  # fmt: skip
        write_table(rows, CORRUPTION_COLUMNS, folder / f"{name}.csv")
        return
    write_table([timm_row(loaded, result)], TIMM_COLUMNS, folder / f"results-{name}.csv")
    for other, suffix in (("restricted", "-restricted"), ("real", "-real")):
        if other in result:
            write_table([timm_row(loaded, result[other])], TIMM_COLUMNS, folder / f"results-{name}{suffix}.csv")
    if class_rows is not None:
        write_table(class_rows, CLASS_COLUMNS, folder / f"{name}_classes.csv")
