"""Running statistics of bottlenecks trained by several processes: after every step their mean over processes.

Each process's norms see its own sentences, and neither DeepSpeed nor the Trainer synchronises buffers: processes would
evaluate with statistics of their own, and only the first one's would be saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from refiner_ds.attention import BatchNorm

__all__ = ["MeanStatistics"]


class MeanStatistics(TrainerCallback):  # type: ignore[misc]  # transformers is not read for types
    """Give it to a Trainer whose model has bottlenecks; :func:`refiner_ds.text.training.make_trainer` does."""

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Take the mean over processes."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        if not buffers:
            return
        packed = torch.cat(buffers)
        dist.all_reduce(packed)
        parts = packed.div_(dist.get_world_size()).split([len(buffer) for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part)
