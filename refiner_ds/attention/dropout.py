"""The one random number of a map's dropout: a seed, from which every entry's draw follows."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from refiner_ds.attention.weights import DeferredMap

__all__ = ["dropout_seed"]


def dropout_seed(deferred: DeferredMap, bits: int) -> int:
    """A seed from torch's global CPU generator, below 2^``bits``; 0, and nothing drawn, without dropout.

    Activation checkpoints restore that generator, and so repeat the seed. It is a number even where tensors are fake:
    a run with dropout has to be planned, too.
    """
    if not deferred.dropout:
        return 0
    with unset_fake_temporarily():
        return int(torch.randint(2**bits, (), device="cpu"))
