"""What a step minimises: cls_weight · CE(class) + dense_weight · mean over patches CE(patch)  (token labelling)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """The loss and its parts, fp32 scalars."""

    total: Tensor
    classes: Tensor
    patches: Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy against distributions over the last axis, in fp32 whatever the logits' type."""
    return torch.sum(-target * F.log_softmax(logits.float(), dim=-1), dim=-1).mean()


def token_label_loss(
    logits_BC: Tensor, logits_BPC: Tensor, target_BC: Tensor, target_BPC: Tensor, cls_weight: float, dense_weight: float
) -> Losses:
    """Class and patch cross-entropies, weighted.

    Args:
        logits_BC, logits_BPC: the model's two training outputs.
        target_BC, target_BPC: distributions over classes; P may be 1 in the latter, one label for all patches.
    """
    classes = soft_cross_entropy(logits_BC, target_BC)
    patches = soft_cross_entropy(logits_BPC, target_BPC)
    return Losses(cls_weight * classes + dense_weight * patches, classes, patches)
