"""cos-reg: the similarity of the maps that neighbouring blocks pass on, a regulariser of the released recipes.

Released loss: 0.1 · mean over the first n neighbouring pairs of blocks of the mean over batch, queries and keys of
the cosine between the two maps along the heads axis. A block that refines passes on the map it was given, so its pair
with the block before is constant 1.
Axes: B batch, H heads, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

__all__ = ["OneTimeLoss", "neighbour_similarity"]


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
        similarities.append(_recomputed_head_cosine(before_BHNN, current_BHNN))
    total = torch.stack(similarities).sum() if similarities else maps[0].new_zeros((), dtype=torch.float32)
    return (total + unchanged) / pairs


def _head_cosine(one_BHNN: Tensor, other_BHNN: Tensor) -> Tensor:
    precision = torch.promote_types(one_BHNN.dtype, torch.float32)
    return F.cosine_similarity(one_BHNN.to(precision), other_BHNN.to(precision), dim=1).mean()


def _recomputed_head_cosine(one_BHNN: Tensor, other_BHNN: Tensor) -> Tensor:
    # Only the two maps are saved, which backward needs anyway; the normalised copies would double a block's bytes.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _head_cosine(one_BHNN, other_BHNN)
    return torch.utils.checkpoint.checkpoint(
        _head_cosine, one_BHNN, other_BHNN, use_reentrant=False, preserve_rng_state=False
    )


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
