"""A model to look into or to evaluate, and images as that model is evaluated on.

runs/mine  runs/mine/checkpoints/step_00001000      a run of this package, EMA weights
runs/mine/export                                    an export, or any folder of timm's or the Hub's form
timm:resnet50=/weights/resnet50.safetensors         any model timm knows, with weights from a file
timm:refiner_vit_l=/weights/refiner_l_448.pth       published weights, at the image size that they were trained at
timm:resnet50                                       … with fresh weights, which the results say
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from refiner_ds.checkpoint.files import CONFIG, find_checkpoint, integrity_errors, read_classes, read_weights
from refiner_ds.config import RunFile, load
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.locate import open_index
from refiner_ds.data.normalize import normalize
from refiner_ds.errors import CheckpointError, ConfigError, DataError
from refiner_ds.files import read_object
from refiner_ds.models import RefinedViT, load_released_weights
from refiner_ds.models.released import read_weight_file, unwrap
from refiner_ds.run_folder import STATE, RunFolder, read_state
from refiner_ds.training.build import build_model

__all__ = ["LoadedModel", "every_checkpoint", "load_model", "open_set"]

TIMM = "timm:"
LONGEST_REASON = 300  # characters: torch names every key that is missing


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what its images must look like.

    Attributes:
        label: how results name it.
        view: how its images are resized and cropped.
        mean, std: of pixels in [0, 1].
        data: the set it was evaluated on in training, where there is one.
        classes: names of its classes in the order of its outputs; None where they are not known.
        run, checkpoint: where it is a run's.
        step: optimizer steps it was trained for, where that is known.
    """

    label: str
    model: nn.Module
    view: EvalSettings
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    data: str | None = None
    classes: list[str] | None = None
    run: RunFile | None = None
    checkpoint: Path | None = None
    step: int | None = None

    def batches(self, index: ShardIndex, images: int, batch: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``images`` images of a set, as the model takes them, [B, 3, S, S] fp32, and their classes [B]."""
        for loaded in eval_batches(index, self.view, batch=batch, rank=0, world_size=1):
            valid_B = loaded.valid_B.clone()
            valid_B[max(images, 0) :] = False
            images -= int(valid_B.sum())
            if valid_B.any():
                yield (
                    normalize(loaded.images_BHWC[valid_B], self.mean, self.std, torch.float32),
                    loaded.labels_B[valid_B],
                )
            if images <= 0:
                return


def load_model(spec: str, weights: str = "ema", test_size: int | None = None) -> LoadedModel:
    """Load what ``spec`` names; see the head of this file.

    Args:
        weights: "ema" or "model", of a run.
        test_size: side of the images it is shown; None: that of its training, or the one timm evaluates it at.
    Raises:
        ConfigError, CheckpointError: no such model or run, or weights that do not fit.
    """
    if spec.startswith(TIMM):
        return _from_timm(spec.removeprefix(TIMM), test_size)
    place = Path(spec)
    loaded = _from_export(place) if _is_export(place) else _from_run(place, weights)
    return loaded if test_size is None else _resized(loaded, test_size)


def every_checkpoint(spec: str) -> list[str]:
    """The undamaged checkpoints of the run that ``spec`` names, oldest first; what names no run stands for itself."""
    if spec.startswith(TIMM) or _is_export(Path(spec)):
        return [spec]
    newest = find_checkpoint(Path(spec))
    saved = RunFolder(newest.parents[1]).saved_checkpoints()
    return [str(folder) for folder in saved if folder == newest or not integrity_errors(folder)] or [str(newest)]


def open_set(model: LoadedModel, place: str | None) -> ShardIndex:
    """The set to look at: the one named, or the model's own validation set. Raises DataError where there is neither."""
    place = place or model.data
    if place is None:
        raise DataError(f"{model.label}: has no validation set of its own; give --data FOLDER")
    return open_index(place, model.run.refiner.data.cache if model.run else None)


def _from_run(place: Path, weights: str) -> LoadedModel:
    checkpoint = find_checkpoint(place)
    run, classes = load(checkpoint / CONFIG), read_classes(checkpoint)
    model = build_model(run, len(classes))
    try:
        model.load_state_dict(read_weights(checkpoint, weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint}: does not fit the model of its own config.json: {first}") from None
    data = run.refiner.data
    view = EvalSettings(run.refiner.model.img_size, data.eval_crop_ratio)
    label = f"{run.folder.name}/{place.name}" if place == checkpoint else run.folder.name
    step = read_state(checkpoint).step
    return LoadedModel(
        label, model.eval(), view, data.mean, data.std, data.val, classes, run=run, checkpoint=checkpoint, step=step
    )


def _is_export(place: Path) -> bool:
    return not (place / STATE).exists() and isinstance((read_object(place / CONFIG) or {}).get("architecture"), str)


def _from_export(place: Path) -> LoadedModel:
    config = json.loads((place / CONFIG).read_text())
    if not timm.is_model(config["architecture"]):
        raise CheckpointError(f"{place / CONFIG}: architecture {config['architecture']} is none that timm knows")
    try:
        model = timm.create_model(f"local-dir:{place}", pretrained=True)
    except Exception as error:  # a folder without weights, or with other ones: each library says it in its own way
        raise CheckpointError(f"{place}: cannot be loaded: {_first_line(error)}") from None
    names = config.get("label_names")
    label = f"{place.parent.name}/{place.name}"
    return _for_timm(label, model, model.pretrained_cfg, list(names) if names else _imagenet_classes(model))


def _from_timm(spec: str, test_size: int | None) -> LoadedModel:
    name, equals, file = spec.partition("=")
    if not timm.is_model(name):
        raise ConfigError(f"timm:{name}: timm knows no model of that name")
    if equals and not Path(file).is_file():
        raise CheckpointError(f"{file}: no such file; give a checkpoint of {name}")
    label = name if equals else f"{name} (fresh weights)"
    try:
        if name.startswith(("refiner_vit", "refined_vit")):
            model = _released(name, Path(file) if equals else None, test_size)
        elif equals:  # as published files are: timm's filter of the architecture takes them from there
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file})
        else:
            model = timm.create_model(name)
    except Exception as error:  # whatever a file that is no checkpoint makes torch or safetensors say
        raise CheckpointError(f"{file or name}: cannot be loaded into {name}: {_first_line(error)}") from None
    loaded = _for_timm(label, model, model.pretrained_cfg, _imagenet_classes(model))
    return loaded if test_size is None else _resized(loaded, test_size)


def _released(name: str, file: Path | None, test_size: int | None) -> nn.Module:
    """One of this package's models with weights under the released names, at their own size unless told otherwise."""
    if file is None:
        return timm.create_model(name, img_size=test_size or 224)
    content = read_weight_file(file)
    found = unwrap(content)
    positions, head = found.get("pos_embed"), found.get("head.weight")
    side = 16 * math.isqrt(positions.shape[1] - 1) if positions is not None else 224
    model = timm.create_model(
        name, img_size=test_size or side, num_classes=1000 if head is None else int(head.shape[0])
    )
    assert isinstance(model, RefinedViT)
    load_released_weights(model, content)
    cfg: Any = model.pretrained_cfg
    cfg["input_size"] = (3, test_size or side, test_size or side)
    return model


def _for_timm(label: str, model: nn.Module, cfg: Any, classes: list[str] | None) -> LoadedModel:
    keys = resolve_data_config(pretrained_cfg=dict(cfg), use_test_size=True)  # as timm's validate.py
    height, width = keys["input_size"][1:]
    if height != width or keys["crop_mode"] not in ("center", "squash") or keys["interpolation"] == "random":
        raise ConfigError(
            f"{label}: is evaluated on {width}×{height} pixels, {keys['interpolation']}, crop mode {keys['crop_mode']};"
            " square images with crop mode center or squash can be made here"
        )
    view = EvalSettings(height, keys["crop_pct"], keys["interpolation"], squash=keys["crop_mode"] == "squash")
    return LoadedModel(label, model.eval(), view, tuple(keys["mean"]), tuple(keys["std"]), classes=classes)


def _imagenet_classes(model: Any) -> list[str] | None:
    """Synsets, for a model with ImageNet's thousand classes."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names()) if getattr(model, "num_classes", None) == 1000 else None


def _resized(loaded: LoadedModel, side: int) -> LoadedModel:
    """The same model at another image size; position embeddings are resized, where it has them."""
    model: Any = loaded.model
    if side != loaded.view.img_size:
        fixed = dict(getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
        try:
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=(side, side))
            elif fixed:
                raise ValueError("it takes images of one size alone")
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"--test-size {side}: {loaded.label} cannot take it: {_first_line(error)}") from None
    return replace(loaded, view=replace(loaded.view, img_size=side))


def _first_line(error: Exception) -> str:
    """What an exception says, in a line; of weights that do not fit, the first that has another shape."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    if lines[0].startswith("Error(s) in loading state_dict") and len(lines) > 1:
        lines = [line for line in lines if line.startswith("size mismatch")] or lines[1:]
    return lines[0] if len(lines[0]) <= LONGEST_REASON else lines[0][:LONGEST_REASON] + " …"
