"""DeepSpeed's AdamW on the CPU, for an optimizer that is offloaded: an extension that it compiles on first use."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch

from refiner_ds.errors import ConfigError

__all__ = ["cpu_adamw"]

log = logging.getLogger("refiner_ds")

NO_STEP = 2**40  # is never followed by the step that comes next


def cpu_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """An AdamW whose steps depend on nothing but weights, gradients, moments and their number.

    Args:
        groups: of parameters, as torch's optimizers take them.
        settings: ``lr``, ``betas``, ``eps``.
    Raises:
        ConfigError: it cannot be compiled here.
    """
    try:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except Exception as error:  # compilers fail in more ways than can be listed
        log.exception("DeepSpeed's CPU AdamW")
        raise ConfigError(
            "zero_optimization.offload_optimizer: DeepSpeed's CPU AdamW cannot be compiled here"
            f" ({type(error).__name__}); install a C++ compiler and ninja, or set its device to none"
        ) from None
    take_step, nothing = optimizer.step, torch.zeros(1)

    def step(*args: Any, **kwargs: Any) -> Any:
        # It multiplies powers of the betas from step to step, and raises them anew where steps do not follow each
        # other: a resumed run would round otherwise than one that was not stopped. So no step follows another.
        group = optimizer.param_groups[0]
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, NO_STEP, 0.0, *group["betas"], 1.0, 0.0, True, nothing, nothing, nothing, nothing
        )
        return take_step(*args, **kwargs)

    optimizer.step = step
    return optimizer
