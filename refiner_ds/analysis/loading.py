"""A model to look into, and images as that model was evaluated on.

runs/mine  runs/mine/checkpoints/step_00001000      a run of this package, EMA weights
timm:resnet50=/weights/resnet50.safetensors         any model timm knows, with weights from a file
timm:resnet50                                       … with fresh weights, which the results say
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from refiner_ds.checkpoint.files import CONFIG, find_checkpoint, read_weights
from refiner_ds.config import load
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.locate import open_index
from refiner_ds.data.normalize import normalize
from refiner_ds.errors import CheckpointError, ConfigError, DataError
from refiner_ds.training.build import build_model

TIMM = "timm:"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what its images must look like.

    Attributes:
        label: how results name it.
        view: how its images are resized and cropped.
        mean, std: of pixels in [0, 1].
        data: the set it was evaluated on in training, where there is one.
    """

    label: str
    model: nn.Module
    view: EvalSettings
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    data: str | None = None

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


def load_model(spec: str, weights: str = "ema") -> LoadedModel:
    """Load what ``spec`` names; see the head of this file.

    Args:
        weights: "ema" or "model", of a run.
    Raises:
        ConfigError, CheckpointError: no such model or run, or weights that do not fit.
    """
    return _from_timm(spec.removeprefix(TIMM)) if spec.startswith(TIMM) else _from_run(Path(spec), weights)


def open_set(model: LoadedModel, place: str | None) -> ShardIndex:
    """The set to look at: the one named, or the model's own validation set. Raises DataError where there is neither."""
    place = place or model.data
    if place is None:
        raise DataError(f"{model.label}: has no validation set of its own; give --data FOLDER")
    return open_index(place)


def _from_run(place: Path, weights: str) -> LoadedModel:
    checkpoint = find_checkpoint(place)
    run = load(checkpoint / CONFIG)
    state = read_weights(checkpoint, weights)
    model = build_model(run, state["head.weight"].shape[0])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint}: does not fit the model of its own config.json: {first}") from None
    data = run.refiner.data
    view = EvalSettings(run.refiner.model.img_size, data.eval_crop_ratio)
    label = place.name if place == checkpoint else run.folder.name
    label = f"{run.folder.name}/{place.name}" if place == checkpoint else label
    return LoadedModel(label, model.eval(), view, data.mean, data.std, data.val)


def _from_timm(spec: str) -> LoadedModel:
    name, equals, file = spec.partition("=")
    if not timm.is_model(name):
        raise ConfigError(f"timm:{name}: timm knows no model of that name")
    if equals and not Path(file).is_file():
        raise CheckpointError(f"{file}: no such file; give a checkpoint of {name}")
    try:
        model = timm.create_model(name, checkpoint_path=file)
    except Exception as error:  # whatever a file that is no checkpoint makes torch or safetensors say
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: cannot be loaded into {name}: {why}") from None
    keys = resolve_model_data_config(model)
    view = EvalSettings(keys["input_size"][-1], keys["crop_pct"], keys["interpolation"])
    label = name if equals else f"{name} (fresh weights)"
    return LoadedModel(label, model.eval(), view, tuple(keys["mean"]), tuple(keys["std"]))
