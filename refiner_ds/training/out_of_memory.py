"""What a rank that runs out of memory says: where, how much, and what each remedy would save.

States are counted as the planner counts them (model_states.py); activations are what is left of the peak, and
proportional to the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from refiner_ds.config import BatchSplit, RunFile
from refiner_ds.config.deepspeed_keys import ZeroKeys
from refiner_ds.errors import RefinerError
from refiner_ds.training.engine import computes_in_bf16
from refiner_ds.training.interval import peak_memory_gib
from refiner_ds.training.model_states import model_states
from refiner_ds.training.world import World

GIB = 2**30


class OutOfMemory(RefinerError):
    """A rank has no memory left: the same command would end the same way."""


@dataclass(frozen=True)
class MemoryUse:
    """What decides how much memory a step takes.

    Attributes:
        peak: bytes allocated at most.
        trained, frozen: parameters of the model.
        zero, world_size, bf16: how DeepSpeed spreads what belongs to them, and in which precision.
        micro_batch, img_size: of a step.
        checkpointing, save_for_backward: as in the run file.
        blocks: of the model.
    """

    peak: int
    trained: int
    frozen: int
    zero: ZeroKeys
    world_size: int
    bf16: bool
    micro_batch: int
    img_size: int
    checkpointing: str
    save_for_backward: str
    blocks: int

    def state(self, stage: int) -> float:
        """Bytes of weights, gradients, moments, EMA and buckets on each process at a ZeRO stage."""
        zero = self.zero.model_copy(update={"stage": stage})
        return model_states(zero, self.trained, self.frozen, self.bf16, self.world_size).total

    @property
    def activations(self) -> float:
        """Bytes of everything else."""
        return max(0.0, self.peak - self.state(self.zero.stage))

    def remedies(self) -> list[str]:
        """What to lower and about how much that would save, the largest first."""
        savings: list[tuple[float, str]] = []
        if self.micro_batch > 1:
            half = f"train_micro_batch_size_per_gpu {self.micro_batch // 2} instead of {self.micro_batch}"
            savings.append((self.activations * (1 - (self.micro_batch // 2) / self.micro_batch), half))
        if self.checkpointing == "none":
            saved = self.activations * (1 - 2 / self.blocks) if self.blocks > 2 else 0.0
            savings.append((saved, "refiner.model.checkpointing pair"))
        if self.save_for_backward == "activations":
            savings.append((0.0, "refiner.model.save_for_backward map"))
        for stage in range(self.zero.stage + 1, 4):
            if (saved := self.state(self.zero.stage) - self.state(stage)) > 0:
                savings.append((saved, f"zero_optimization.stage {stage}"))
        savings.sort(key=lambda saving: -saving[0])
        return [f"{what} (saves about {saved / GIB:.2g} GiB)" if saved else what for saved, what in savings]


def out_of_memory(rank: int, step: int, doing: str, use: MemoryUse, error: BaseException) -> OutOfMemory:
    """The sentence for a rank that ran out of memory.

    Args:
        step: counted from 1; ``doing`` what.
        error: what the allocator said.
    """
    asked = str(error).strip().partition("\n")[0]
    return OutOfMemory(
        f"rank {rank} is out of memory in step {step} ({doing}) with {use.micro_batch} images of {use.img_size} px at"
        f" once, after a peak of {use.peak / GIB:.2f} GiB ({asked}); set one of {'; '.join(use.remedies())}"
    )


def memory_use(run: RunFile, model: nn.Module, batch: BatchSplit, world: World) -> MemoryUse:
    """What this rank's steps take."""
    keys = run.refiner.model
    # At stage 3 a rank's own parameters are empty.
    counts = [(getattr(one, "ds_numel", one.numel()), one.requires_grad) for one in model.parameters()]
    return MemoryUse(
        int(peak_memory_gib(world.device) * GIB),
        sum(count for count, trained in counts if trained),
        sum(count for count, trained in counts if not trained),
        run.keys.zero_optimization,
        world.size,
        computes_in_bf16(run, world),
        batch.micro_batch,
        keys.img_size,
        keys.checkpointing,
        keys.save_for_backward,
        len(getattr(model, "blocks", ())),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory, on a GPU or on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
