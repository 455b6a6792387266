"""The top level of a run file: DeepSpeed's keys and sections (deepspeed_keys.py) around the project's own (schema.py).

Keys of DeepSpeed's that would contradict the recipe (optimizer, scheduler, gradient_accumulation_steps …) are refused
with the recipe's own key: see ``INSTEAD``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from refiner_ds.config.combinations import refused_combination
from refiner_ds.config.deepspeed_keys import (
    ActivationCheckpointingKeys,
    BF16Keys,
    CommsLoggerKeys,
    DataTypesKeys,
    FlopsProfilerKeys,
    ZeroKeys,
)
from refiner_ds.config.schema import RefinerKeys, Section

INSTEAD = {
    "gradient_accumulation_steps": "it follows from train_batch_size, the micro-batch and the world size",
    "optimizer": "the optimizer is AdamW, set by refiner.recipe.lr, weight_decay, betas and eps",
    "scheduler": "the schedule is set by refiner.recipe.schedule, warmup_epochs and min_lr",
    "tensorboard": "TensorBoard events are always written to the run folder",
    "fp16": "training is in bf16 or fp32: set bf16.enabled",
    "bfloat16": "write bf16",
}


class RunFileKeys(Section):
    """Top level of a run file: the batch and DeepSpeed's sections; ``refiner`` is the project's own."""

    may_change = frozenset(
        {
            *("extends", "about", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "zero_optimization"),
            *("data_types", "activation_checkpointing", "flops_profiler", "comms_logger", "communication_data_type"),
            *("prescale_gradients", "gradient_predivide_factor"),
            *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
        }
    )

    extends: str | None = Field(None, description="another run file, relative to this one, that this one changes")
    about: str | None = Field(None, description="what this recipe was measured to do, on what, by which command")
    refiner: RefinerKeys
    train_batch_size: int = Field(
        1024, gt=0, description="global batch of an optimizer step, images: part of the recipe"
    )
    train_micro_batch_size_per_gpu: int | None = Field(
        None, gt=0, description="images a rank computes at once; null: its whole share of the global batch"
    )
    gradient_clipping: float | None = Field(None, ge=0, description="largest gradient norm; null or 0: no clipping")
    zero_optimization: ZeroKeys = Field(default_factory=ZeroKeys)
    bf16: BF16Keys = Field(default_factory=BF16Keys)
    data_types: DataTypesKeys | None = Field(None, description="types of accumulated gradients")
    activation_checkpointing: ActivationCheckpointingKeys | None = Field(None, description="how DeepSpeed recomputes")
    flops_profiler: FlopsProfilerKeys | None = Field(None, description="DeepSpeed's profile of one step")
    comms_logger: CommsLoggerKeys | None = Field(None, description="DeepSpeed's log of collectives")
    communication_data_type: Literal["fp32", "bf16"] | None = Field(
        None, description="type that gradients are reduced in"
    )
    prescale_gradients: bool | None = Field(
        None, description="divide gradients before they are reduced, not after; against overflow in bf16"
    )
    gradient_predivide_factor: float | None = Field(
        None,
        gt=0,
        description="with prescale_gradients: divide by this before reducing, and by the rest of the world size after",
    )
    steps_per_print: int | None = Field(None, gt=0, description="DeepSpeed's own progress lines, into the log file")
    wall_clock_breakdown: bool | None = Field(None, description="DeepSpeed's own timers, into the log file")
    memory_breakdown: bool | None = Field(None, description="log memory in use around forward, backward and step")
    dump_state: bool | None = Field(None, description="log the engine's whole configuration at the start")

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _bare_stage(cls, value: Any) -> Any:
        # DeepSpeed once took a bare boolean here; a sentence about the object is more useful than a type error.
        if isinstance(value, bool):
            raise ValueError('must be an object such as {"stage": 1}')
        return value

    @model_validator(mode="after")
    def _works_together(self) -> Self:
        problem = refused_combination(
            self.refiner.model,
            self.zero_optimization,
            bf16=self.bf16.enabled is not False,
            accumulated_in=None if self.data_types is None else self.data_types.grad_accum_dtype,
            by_deepspeed=self.activation_checkpointing is not None,
            prescales=bool(self.prescale_gradients) or self.gradient_predivide_factor not in (None, 1),
        )
        if problem is not None:
            raise ValueError(problem)
        return self
