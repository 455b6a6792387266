"""Writes the export of a checkpoint, whole or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from timm.models import save_for_hf

from refiner_ds.checkpoint.files import CONFIG, read_classes, read_weights
from refiner_ds.config import RunFile, load
from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.export.card import Subject, model_card
from refiner_ds.export.onnx_file import require_onnx, write_onnx
from refiner_ds.files import has_numbers, read_object
from refiner_ds.models import RefinedViT
from refiner_ds.run_folder import CALIBRATION, RunFolder, read_state
from refiner_ds.training.build import build_model

__all__ = ["Exported", "ExportOptions", "export"]


@dataclass(frozen=True)
class ExportOptions:
    """What is to be exported.

    Attributes:
        weights: "ema" or "model".
        test_size: side of the images, pixels; None: as trained.
        crop_ratio: None: the calibrated one where there is one, else the run's.
        license: of the weights, as the Hub writes it.
    """

    weights: str = "ema"
    test_size: int | None = None
    crop_ratio: float | None = None
    onnx: bool = False
    license: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        crop_source: where the crop ratio came from, in words.
        onnx_difference: largest difference of ONNX logits, over the largest logit; None without ONNX.
    """

    classes: int
    crop_ratio: float
    crop_source: str
    onnx_difference: float | None


def export(checkpoint: Path, options: ExportOptions, out: Path) -> Exported:
    """Write ``out`` from a checkpoint, in place of an earlier export; it is whole or as it was before.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit its own run file, or ``out`` is something else.
        ConfigError: the model cannot take the image size, or ONNX's packages are missing.
    """
    run, classes = load(checkpoint / CONFIG), read_classes(checkpoint)
    if out.exists() and not (out / "config.json").is_file():
        raise CheckpointError(f"{out}: exists and is no export; give another --out")
    if options.onnx:
        require_onnx()
    model = build_model(run, len(classes))
    try:
        model.load_state_dict(read_weights(checkpoint, options.weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint}: does not fit the model of its own config.json: {first}") from None
    side = _resize(model, run, options.test_size)
    results = _results(checkpoint, options.weights, side if options.test_size and side != _trained(run) else None)
    crop_ratio, source = _crop_ratio(run, options, results)
    data = run.refiner.data
    seen = {"input_size": (3, side, side), "mean": data.mean, "std": data.std, "crop_pct": crop_ratio}
    about = {
        "label_names": classes[: model.num_classes],
        "refiner_ds": {"run": run.folder.name, "weights": options.weights, "step": read_state(checkpoint).step},
    }
    subject = Subject(run, checkpoint, options.weights, classes, side, crop_ratio, source, results, options.license)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    difference = None
    try:
        save_for_hf(model.eval(), str(draft), about, safe_serialization=True, data_config=seen)
        if options.onnx:
            difference = write_onnx(model, side, draft / "model.onnx")
        (draft / "README.md").write_text(model_card(subject, model, difference))
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(len(classes), crop_ratio, source, difference)


def _trained(run: RunFile) -> int:
    return run.refiner.model.img_size


def _resize(model: RefinedViT, run: RunFile, side: int | None) -> int:
    if side is None or side == _trained(run):
        return _trained(run)
    try:
        model.set_input_size(img_size=side)
    except ValueError as error:
        raise ConfigError(f"--test-size {side}: {error}") from None
    return side


def _results(checkpoint: Path, weights: str, other_size: int | None) -> Path | None:
    """Where these very weights' results at this image size would be; None for a checkpoint outside its run."""
    run, step = RunFolder(checkpoint.parents[1]), read_state(checkpoint).step
    if run.checkpoint(step) != checkpoint or not run.config.is_file():
        return None
    folder = run.results(step, weights)
    return folder if other_size is None else folder.with_name(f"{folder.name}_{other_size}px")


def _crop_ratio(run: RunFile, options: ExportOptions, results: Path | None) -> tuple[float, str]:
    """The ratio to export, and where it comes from."""
    if options.crop_ratio is not None:
        return options.crop_ratio, "as given"
    if results is not None and (file := results / CALIBRATION).exists():
        found = read_object(file) or {}
        if not has_numbers(found, "crop_ratio"):
            raise CheckpointError(f"{file}: is damaged; calibrate again, or give --crop-ratio R")
        return float(found["crop_ratio"]), "calibrated"
    return run.refiner.data.eval_crop_ratio, "the run's"
