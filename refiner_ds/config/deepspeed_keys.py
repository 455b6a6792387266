"""DeepSpeed's own keys that a run file may hold.

DeepSpeed ignores unknown top-level keys, and unknown keys in some of its sections, so a misspelt ``gradient_cliping``
would train for a month without clipping. Here every key is declared; ``tests/config`` compares the declarations with
the installed DeepSpeed's, so that a new release cannot make them lie. Keys that would contradict the recipe (optimizer,
scheduler, gradient_accumulation_steps …) are refused with the recipe's own key: see ``INSTEAD``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from refiner_ds.config.combinations import refused_combination
from refiner_ds.config.schema import RefinerKeys, Section

INSTEAD = {
    "gradient_accumulation_steps": "it follows from train_batch_size, the micro-batch and the world size",
    "optimizer": "the optimizer is AdamW, set by refiner.recipe.lr, weight_decay, betas and eps",
    "scheduler": "the schedule is set by refiner.recipe.schedule, warmup_epochs and min_lr",
    "tensorboard": "TensorBoard events are always written to the run folder",
    "fp16": "training is in bf16 or fp32: set bf16.enabled",
    "bfloat16": "write bf16",
}


class BF16Keys(Section):
    """``bf16``: DeepSpeed's mixed precision, bf16 parameters over fp32 master weights."""

    enabled: bool | Literal["auto"] = Field(
        "auto", description="auto: on where the accelerator computes bf16 natively (not on CPUs)"
    )
    immediate_grad_update: bool | None = Field(
        None, description="add each gradient to its fp32 copy as backward produces it, not after it"
    )
    check_grad_overflow: bool | None = Field(None, description="skip a step whose gradients are not finite")
    bf16_master_weights_and_grads: bool | None = Field(
        None,
        description="master weights and gradients in bf16: less memory, but small updates are lost; not for long runs",
    )
    bf16_optimizer_states: bool | None = Field(
        None, description="keep AdamW's moments in bf16 too (needs bf16_master_weights_and_grads); not for long runs"
    )


class OffloadOptimizerKeys(Section):
    """``zero_optimization.offload_optimizer`` (stages 1 to 3)."""

    device: Literal["none", "cpu"] | None = Field(
        None, description="where master weights and optimizer states live; cpu: in host memory, updated by the CPU"
    )
    pin_memory: bool | None = Field(None, description="use page-locked host memory, for fast asynchronous copies")


class OffloadParamKeys(Section):
    """``zero_optimization.offload_param`` (stage 3)."""

    device: Literal["none", "cpu"] | None = Field(None, description="where parameters live between uses")
    pin_memory: bool | None = Field(None, description="use page-locked host memory, for fast asynchronous copies")


class ZeroKeys(Section):
    """``zero_optimization``: how states are partitioned over processes."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0: nothing; 1: optimizer states; 2: and gradients; 3: and parameters"
    )
    contiguous_gradients: bool | None = Field(
        None, description="copy gradients into one buffer as they are produced, which avoids fragmented memory"
    )
    reduce_scatter: bool | None = Field(
        None, description="average gradients with reduce-scatter or reduce, not all-reduce"
    )
    reduce_bucket_size: int | None = Field(
        None,
        gt=0,
        description="elements reduced at a time: larger is faster and takes more memory; "
        "null: 500 million, or all trained parameters where these are fewer",
    )
    use_multi_rank_bucket_allreduce: bool | None = Field(
        None,
        description="stages 1 and 2: one all-reduce over all ranks' buckets; for small models on many GPUs",
    )
    allgather_partitions: bool | None = Field(
        None, description="collect updated parameters with all-gather; false: with a broadcast from each rank"
    )
    allgather_bucket_size: int | None = Field(
        None, ge=0, description="elements gathered at a time: larger is faster and takes more memory"
    )
    overlap_comm: bool | None = Field(None, description="reduce gradients while backward goes on")
    round_robin_gradients: bool | None = Field(
        None, description="stages 1 and 2 with CPU offload: ranks copy gradients to the host in turn, in parallel"
    )
    parameter_alignment: bool | None = Field(
        None, description="stages 1 and 2: pad buffers so that every parameter starts at a 16-byte boundary"
    )
    ignore_unused_parameters: bool | None = Field(
        None, description="stage 2: go on where a parameter got no gradient; false: stop"
    )
    offload_optimizer: OffloadOptimizerKeys | None = Field(
        None, description="master weights and optimizer states in host memory"
    )
    offload_param: OffloadParamKeys | None = Field(None, description="stage 3: parameters in host memory")
    sub_group_size: int | None = Field(
        None, ge=0, description="stage 3: elements the optimizer updates at a time; matters with offload"
    )
    stage3_prefetch_bucket_size: int | None = Field(
        None, ge=0, description="stage 3: elements fetched ahead of their use"
    )
    stage3_param_persistence_threshold: int | None = Field(
        None, ge=0, description="stage 3: smaller parameters are kept whole on every rank"
    )
    stage3_model_persistence_threshold: int | None = Field(
        None, ge=0, description="stage 3: most elements that are kept whole on a rank in all"
    )
    stage3_max_live_parameters: int | None = Field(
        None, ge=0, description="stage 3: most gathered elements on a GPU before some are released"
    )
    stage3_max_reuse_distance: int | None = Field(
        None, ge=0, description="stage 3: a parameter used again within so many elements is not released"
    )
    zero_hpz_partition_size: int | None = Field(
        None,
        ge=0,
        description="stage 3, ZeRO++: ranks that hold a second copy, usually those of a node; 1: no copy",
    )
    zero_quantized_weights: bool | None = Field(
        None, description="stage 3, ZeRO++: gather parameters quantised to 8 bits"
    )
    zero_quantized_gradients: bool | None = Field(
        None, description="stage 3, ZeRO++: reduce gradients quantised to 4 bits"
    )
    memory_efficient_linear: bool | None = Field(
        None, description="stage 3: linear layers that keep no gathered weight for backward"
    )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the CPU holds the optimizer's states and updates weights."""
        return self.offload_optimizer is not None and self.offload_optimizer.device == "cpu"

    @model_validator(mode="after")
    def _offloads_what_is_partitioned(self) -> Self:
        if self.offloads_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer must be null at stage 0; stages 1 to 3 offload the optimizer")
        if self.offload_param is not None and self.offload_param.device == "cpu" and self.stage != 3:
            raise ValueError(f"offload_param must be null at stage {self.stage}; stage 3 offloads parameters")
        return self


class ActivationCheckpointingKeys(Section):
    """``activation_checkpointing``: present: DeepSpeed's implementation recomputes; absent: torch's."""

    partition_activations: bool | None = Field(None, description="split saved activations over model-parallel ranks")
    cpu_checkpointing: bool | None = Field(
        None, description="save activations in host memory (needs partition_activations)"
    )
    contiguous_memory_optimization: bool | None = Field(
        None, description="save activations in one buffer (needs partition_activations and number_checkpoints)"
    )
    number_checkpoints: int | None = Field(
        None, gt=0, description="checkpoints a forward pass makes, which sizes that buffer"
    )
    synchronize_checkpoint_boundary: bool | None = Field(
        None, description="wait for the GPU at both ends of each checkpoint; for debugging"
    )
    profile: bool | None = Field(None, description="log the time of each checkpoint's forward and backward")


class FlopsProfilerKeys(Section):
    """``flops_profiler``."""

    enabled: bool | None = Field(None, description="profile one step")
    recompute_fwd_factor: float | None = Field(
        None, ge=0, description="recomputed share of the forward pass, counted into the FLOPs; 0: none, 1: all of it"
    )
    profile_step: int | None = Field(None, ge=0, description="step to profile")
    module_depth: int | None = Field(None, description="depth of the modules listed; -1: the innermost")
    top_modules: int | None = Field(None, gt=0, description="modules listed at each depth")
    detailed: bool | None = Field(None, description="list every module, not only the summary")
    output_file: str | None = Field(None, description="where the profile goes; null: the log")


class CommsLoggerKeys(Section):
    """``comms_logger``."""

    enabled: bool | None = Field(None, description="log collectives: count, size, latency and bandwidth")
    verbose: bool | None = Field(None, description="log each collective as it happens, not only the summary")
    prof_all: bool | None = Field(None, description="log all collectives; false: those of prof_ops")
    prof_ops: list[str] | None = Field(None, description="names of the collectives to log, such as all_reduce")
    debug: bool | None = Field(None, description="name the calling function of each collective")


class DataTypesKeys(Section):
    """``data_types``."""

    grad_accum_dtype: Literal["fp32", "bf16"] | None = Field(None, description="type that gradients are accumulated in")


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
            self.zero_optimization.stage,
            self.bf16.enabled is not False,
            self.data_types is not None and self.data_types.grad_accum_dtype == "fp32",
            self.activation_checkpointing is not None,
        )
        if problem is not None:
            raise ValueError(problem)
        return self
