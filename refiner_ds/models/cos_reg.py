"""cos-reg: the similarity of the maps that neighbouring blocks pass on, a regulariser of the released recipes.

Released loss: 0.1 · mean over the first n neighbouring pairs of blocks of the mean over batch, queries and keys of
the cosine between the two maps along the heads axis. A block that refines passes on the map it was given, so its pair
with the block before is constant 1.
Axes: B batch, H heads, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds.attention import is_traced, is_transformed

__all__ = ["OneTimeLoss", "neighbour_similarity"]

EPS = 1e-8  # of torch.nn.CosineSimilarity, which the released loss uses


def neighbour_similarity(maps: list[Tensor], makes_map: list[bool], pairs: int) -> Tensor:
    """Mean cosine similarity, over heads, of the maps of neighbouring blocks; a scalar in fp32 or better.

    Args:
        maps: the maps [B, H, N, N] that blocks made, in order.
        makes_map: for every block whether it made one; the others pass on the map before. The first block makes one.
        pairs: how many neighbouring pairs are counted, from the first block on.
    """
    made = iter(maps)
    current_BHNN = next(made)
    similarities, unchanged = [], 0
    for makes in makes_map[1 : pairs + 1]:
        if not makes:
            unchanged += 1
            continue
        before_BHNN, current_BHNN = current_BHNN, next(made)
        similarities.append(_mean_cosine(before_BHNN, current_BHNN))
    total = torch.stack(similarities).sum() if similarities else maps[0].new_zeros((), dtype=torch.float32)
    return (total + unchanged) / pairs


def _mean_cosine(one_BHNN: Tensor, other_BHNN: Tensor) -> Tensor:
    if is_traced() or is_transformed():
        precision = torch.promote_types(one_BHNN.dtype, torch.float32)
        return F.cosine_similarity(one_BHNN.to(precision), other_BHNN.to(precision), dim=1, eps=EPS).mean()
    return _MeanCosine.apply(one_BHNN, other_BHNN)


class _MeanCosine(torch.autograd.Function):
    """Mean cosine along heads; saves the two maps alone, which backward of the blocks saves anyway.

    It goes through the maps head by head: autograd of ``F.cosine_similarity`` takes eight times as long on a CPU and
    keeps copies of both maps.
    """

    @staticmethod
    def forward(ctx: Any, one_BHNN: Tensor, other_BHNN: Tensor) -> Tensor:
        ctx.save_for_backward(one_BHNN, other_BHNN)
        return _cosine(one_BHNN, other_BHNN)[0].mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        one_BHNN, other_BHNN = ctx.saved_tensors
        cosine_BNN, norm_BNN, other_norm_BNN = _cosine(one_BHNN, other_BHNN)
        across_BNN = grad / cosine_BNN.numel() / (norm_BNN * other_norm_BNN)
        # ∂cos/∂a = b/(|a||b|) − a·cos/|a|²; a norm below EPS counts as the constant EPS.
        along_BNN = across_BNN * cosine_BNN
        along_one_BNN = torch.where(norm_BNN > EPS, along_BNN * other_norm_BNN / norm_BNN, 0)
        along_other_BNN = torch.where(other_norm_BNN > EPS, along_BNN * norm_BNN / other_norm_BNN, 0)
        d_one_BHNN, d_other_BHNN = torch.empty_like(one_BHNN), torch.empty_like(other_BHNN)
        for head in range(one_BHNN.shape[1]):
            one_BNN, other_BNN = one_BHNN[:, head].to(across_BNN.dtype), other_BHNN[:, head].to(across_BNN.dtype)
            d_one_BHNN[:, head] = torch.addcmul(across_BNN * other_BNN, along_one_BNN, one_BNN, value=-1)
            d_other_BHNN[:, head] = torch.addcmul(across_BNN * one_BNN, along_other_BNN, other_BNN, value=-1)
        return d_one_BHNN, d_other_BHNN


def _cosine(one_BHNN: Tensor, other_BHNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine along heads and both norms, not below EPS; [B, N, N] each, in fp32 or better."""
    precision = torch.promote_types(one_BHNN.dtype, torch.float32)
    dot_BNN, square_BNN, other_square_BNN = (
        one_BHNN.new_zeros(one_BHNN[:, 0].shape, dtype=precision) for _ in range(3)
    )
    for head in range(one_BHNN.shape[1]):
        one_BNN, other_BNN = one_BHNN[:, head].to(precision), other_BHNN[:, head].to(precision)
        dot_BNN.addcmul_(one_BNN, other_BNN)
        square_BNN.addcmul_(one_BNN, one_BNN)
        other_square_BNN.addcmul_(other_BNN, other_BNN)
    norm_BNN, other_norm_BNN = square_BNN.sqrt().clamp_min(EPS), other_square_BNN.sqrt().clamp_min(EPS)
    return dot_BNN / norm_BNN / other_norm_BNN, norm_BNN, other_norm_BNN


class OneTimeLoss:
    """A loss on its way from a model's forward to the training loop, given out once.

    It is part of a graph, which copies, pickles and later steps must not hold on to: they get an empty one.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def put(self, value: Tensor | None) -> None:
        """Keep the loss of this forward; ``None`` forgets the one before."""
        self._value = value

    def take(self) -> Tensor:
        """The loss of the last forward.

        Raises:
            ValueError: there is none.
        """
        value, self._value = self._value, None
        if value is None:
            raise ValueError("there is no cos-reg penalty: create the model with cos_reg=0.1 and run it in training")
        return value

    def __reduce__(self) -> tuple[type[OneTimeLoss], tuple[()]]:
        return OneTimeLoss, ()
