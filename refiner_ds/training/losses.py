"""What a step minimises: cls_weight · CE(class) + dense_weight · mean over patches CE(patch)  (token labelling)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Losses(NamedTuple):
    """The loss of a micro-batch and its parts, fp32 scalars.

    Attributes:
        total: what backward starts from, and what is logged and checked as ``loss``.
        parts: by name, before weighting; logged as ``loss_<name>``.
    """

    total: Tensor
    parts: dict[str, Tensor]

    def plus(self, name: str, penalty: Tensor) -> Losses:
        """With a penalty that is weighted already."""
        return Losses(self.total + penalty, {**self.parts, name: penalty})


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
    cls, patch = soft_cross_entropy(logits_BC, target_BC), soft_cross_entropy(logits_BPC, target_BPC)
    return Losses(cls_weight * cls + dense_weight * patch, {"cls": cls, "patch": patch})
