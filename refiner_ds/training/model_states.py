"""Bytes of weights, gradients, optimizer states and EMA on each process, by ZeRO stage and precision.

What DeepSpeed allocates for this project's engine: b bytes a parameter in the precision of training, fp32 masters apart
from the weights in all cases but one, two fp32 moments, and the EMA in the form of the masters.

    stage    weights            gradients    masters               moments   EMA
    0        b                  b            4 in bf16, else none  8         4
    1        b                  b            4 / N                 8 / N     4 / N
    2        b                  b / N        4 / N                 8 / N     4 / N
    3        b / N, and gathered  b / N      4 / N                 8 / N     4 / N

Stages 1 to 3 also hold a bucket of ``reduce_bucket_size`` entries in backward, whole however few are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from refiner_ds.config.deepspeed_keys import ZeroKeys

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one process.

    Attributes:
        weights: in the precision of training, gathered ones of stage 3 included.
        gradients: while they are accumulated.
        optimizer: fp32 masters and moments.
        ema: the average of the masters.
        buckets: gradients on their way to other processes.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buckets: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.buckets


def reduce_bucket_size(zero: ZeroKeys, trained: int) -> int:
    """Elements of a bucket of gradients: the run file's, or DeepSpeed's own, of which no more than the model can fill.

    Args:
        trained: parameters.
    """
    return zero.reduce_bucket_size or max(1, min(REDUCE_BUCKET, trained))


def model_states(zero: ZeroKeys, trained: int, frozen: int, bf16: bool, world_size: int) -> ModelStates:
    """What a process holds beside activations.

    Args:
        trained, frozen: parameters.
        bf16: whether the engine trains in bf16.
    """
    stage, b = zero.stage, 2 if bf16 else 4
    share = trained / world_size
    owned = share if stage else trained
    masters = 4 * owned if bf16 or stage else 0
    weights: float = b * (trained + frozen)
    if stage == 3:
        live = min(trained + frozen, zero.stage3_max_live_parameters or MAX_LIVE)
        weights = b * ((trained + frozen) / world_size + live)
    contiguous = stage == 3 or zero.contiguous_gradients is not False
    bucket = b * reduce_bucket_size(zero, trained) if stage and contiguous else 0
    buffers = 2 if stage in (1, 2) and zero.overlap_comm else 1
    return ModelStates(
        weights=weights,
        gradients=b * (share if stage >= 2 else trained),
        optimizer=0 if zero.offloads_optimizer else masters + 8 * owned,
        ema=0 if zero.offloads_optimizer else 4 * owned,
        buckets=bucket * buffers,
    )
