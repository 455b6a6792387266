"""What a step minimises.

    class head alone      cls_weight · CE(class)
    with the dense head   cls_weight · CE(class) + dense_weight · mean over patches CE(patch)      (token labelling)
    with cos-reg          … + cos_reg · mean similarity of neighbouring maps                       (released models)

All of it is one number: minimised, logged and checked alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """The loss of a micro-batch and its parts, fp32 scalars.

    Attributes:
        total: what backward starts from, and what is logged and checked as ``loss``.
        parts: by name, logged as ``loss_<name>``: cross-entropies before weighting, penalties as they are added.
    """

    total: Tensor
    parts: dict[str, Tensor]

    def plus(self, name: str, penalty: Tensor) -> Losses:
        """With a penalty that is weighted already."""
        return Losses(self.total + penalty, {**self.parts, name: penalty})


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy against distributions over the last axis, in fp32 whatever the logits' type."""
    return torch.sum(-target * F.log_softmax(logits.float(), dim=-1), dim=-1).mean()


def class_loss(logits_BC: Tensor, target_BC: Tensor, cls_weight: float) -> Losses:
    """Class cross-entropy alone, weighted; for models without a dense head."""
    cls = soft_cross_entropy(logits_BC, target_BC)
    return Losses(cls_weight * cls, {"cls": cls})


def token_label_loss(
    logits_BC: Tensor, logits_BPC: Tensor, target_BC: Tensor, target_BPC: Tensor, cls_weight: float, dense_weight: float
) -> Losses:
    """Class and patch cross-entropies, weighted.

    Args:
        logits_BC, logits_BPC: the model's two training outputs.
        target_BC, target_BPC: distributions over classes; P may be 1 in the latter, one label for all patches.
    """
    cls, patch = soft_cross_entropy(logits_BC, target_BC), soft_cross_entropy(logits_BPC, target_BPC)
    return Losses(cls_weight * cls + dense_weight * patch, {"cls": cls, "patch": patch})
