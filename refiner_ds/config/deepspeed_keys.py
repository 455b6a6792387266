"""DeepSpeed's own keys that a run file may hold.

DeepSpeed ignores unknown top-level keys, and unknown keys in some of its sections, so a misspelt ``gradient_cliping``
would train for a month without clipping. Here every key is declared; ``tests/config`` compares the declarations with
the installed DeepSpeed's, so that a new release cannot make them lie. Keys that would contradict the recipe (optimizer,
scheduler, gradient_accumulation_steps …) are refused with the recipe's own key: see ``INSTEAD``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from refiner_ds.config.schema import RefinerKeys, Section

INSTEAD = {
    "gradient_accumulation_steps": "it follows from train_batch_size, the micro-batch and the number of processes",
    "optimizer": "the optimizer is AdamW, set by refiner.recipe.lr, weight_decay, betas and eps",
    "scheduler": "the schedule is set by refiner.recipe.schedule, warmup_epochs and min_lr",
    "tensorboard": "TensorBoard events are always written to the run folder",
    "fp16": "this project trains in bf16 or fp32: set bf16.enabled",
    "bfloat16": "write bf16",
}


class BF16Keys(Section):
    """``bf16``: DeepSpeed's mixed precision, bf16 parameters over fp32 master weights."""

    enabled: bool | Literal["auto"] = Field(
        "auto", description="auto: on where the accelerator computes bf16 natively (not on CPUs)"
    )
    immediate_grad_update: bool | None = Field(None, description="DeepSpeed's")
    check_grad_overflow: bool | None = Field(None, description="skip a step whose gradients are not finite")
    bf16_master_weights_and_grads: bool | None = Field(None, description="DeepSpeed's; not for long trainings")
    bf16_optimizer_states: bool | None = Field(None, description="DeepSpeed's; not for long trainings")


class OffloadOptimizerKeys(Section):
    """``zero_optimization.offload_optimizer``."""

    device: Literal["none", "cpu", "nvme"] | None = Field(None, description="where optimizer states live")
    nvme_path: str | None = Field(None, description="folder on the NVMe device")
    buffer_count: int | None = Field(None, ge=0, description="DeepSpeed's")
    pin_memory: bool | None = Field(None, description="page-locked host memory")
    pipeline_read: bool | None = Field(None, description="DeepSpeed's")
    pipeline_write: bool | None = Field(None, description="DeepSpeed's")
    fast_init: bool | None = Field(None, description="DeepSpeed's")
    ratio: float | None = Field(None, ge=0, le=1, description="share of parameters updated on the CPU")
    super_offload: bool | None = Field(None, description="DeepSpeed's")
    cpuadam_cores_perc: float | None = Field(None, ge=0, le=1, description="DeepSpeed's")


class OffloadParamKeys(Section):
    """``zero_optimization.offload_param`` (stage 3)."""

    device: Literal["none", "cpu", "nvme"] | None = Field(None, description="where parameters live")
    nvme_path: str | None = Field(None, description="folder on the NVMe device")
    buffer_count: int | None = Field(None, ge=0, description="DeepSpeed's")
    buffer_size: int | None = Field(None, ge=0, description="DeepSpeed's")
    max_in_cpu: int | None = Field(None, ge=0, description="DeepSpeed's")
    pin_memory: bool | None = Field(None, description="page-locked host memory")


class ZeroKeys(Section):
    """``zero_optimization``: how states are partitioned over processes."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0: nothing; 1: optimizer states; 2: and gradients; 3: and parameters"
    )
    contiguous_gradients: bool | None = Field(None, description="DeepSpeed's")
    reduce_scatter: bool | None = Field(None, description="DeepSpeed's")
    reduce_bucket_size: int | None = Field(None, gt=0, description="elements reduced at once")
    use_multi_rank_bucket_allreduce: bool | None = Field(None, description="DeepSpeed's")
    allgather_partitions: bool | None = Field(None, description="DeepSpeed's")
    allgather_bucket_size: int | None = Field(None, ge=0, description="elements gathered at once")
    overlap_comm: bool | None = Field(None, description="reduce gradients while backward goes on")
    round_robin_gradients: bool | None = Field(None, description="DeepSpeed's")
    parameter_alignment: bool | None = Field(None, description="DeepSpeed's")
    ignore_unused_parameters: bool | None = Field(None, description="DeepSpeed's")
    offload_optimizer: OffloadOptimizerKeys | None = Field(None, description="see below")
    offload_param: OffloadParamKeys | None = Field(None, description="see below")
    sub_group_size: int | None = Field(None, ge=0, description="stage 3: elements a sub-group")
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0, description="DeepSpeed's")
    stage3_param_persistence_threshold: int | None = Field(
        None, ge=0, description="smaller parameters are not partitioned"
    )
    stage3_model_persistence_threshold: int | None = Field(None, ge=0, description="DeepSpeed's")
    stage3_max_live_parameters: int | None = Field(None, ge=0, description="DeepSpeed's")
    stage3_max_reuse_distance: int | None = Field(None, ge=0, description="DeepSpeed's")
    zero_hpz_partition_size: int | None = Field(None, ge=0, description="ZeRO++: secondary partition")
    zero_quantized_weights: bool | None = Field(None, description="ZeRO++")
    zero_quantized_gradients: bool | None = Field(None, description="ZeRO++")
    memory_efficient_linear: bool | None = Field(None, description="DeepSpeed's")


class ActivationCheckpointingKeys(Section):
    """``activation_checkpointing``: present: DeepSpeed's implementation recomputes; absent: torch's."""

    partition_activations: bool | None = Field(None, description="split kept activations over model-parallel ranks")
    cpu_checkpointing: bool | None = Field(
        None, description="keep activations on the host (needs partition_activations)"
    )
    contiguous_memory_optimization: bool | None = Field(None, description="DeepSpeed's")
    number_checkpoints: int | None = Field(None, gt=0, description="DeepSpeed's")
    synchronize_checkpoint_boundary: bool | None = Field(None, description="DeepSpeed's")
    profile: bool | None = Field(None, description="DeepSpeed's")


class FlopsProfilerKeys(Section):
    """``flops_profiler``."""

    enabled: bool | None = Field(None, description="profile one step")
    recompute_fwd_factor: float | None = Field(None, ge=0, description="DeepSpeed's")
    profile_step: int | None = Field(None, ge=0, description="which step")
    module_depth: int | None = Field(None, description="DeepSpeed's")
    top_modules: int | None = Field(None, gt=0, description="DeepSpeed's")
    detailed: bool | None = Field(None, description="DeepSpeed's")
    output_file: str | None = Field(None, description="where the profile goes; null: the log")


class CommsLoggerKeys(Section):
    """``comms_logger``."""

    enabled: bool | None = Field(None, description="log collectives")
    verbose: bool | None = Field(None, description="DeepSpeed's")
    prof_all: bool | None = Field(None, description="DeepSpeed's")
    prof_ops: list[str] | None = Field(None, description="which collectives")
    debug: bool | None = Field(None, description="DeepSpeed's")


class DataTypesKeys(Section):
    """``data_types``."""

    grad_accum_dtype: Literal["fp32", "bf16"] | None = Field(None, description="type gradients are accumulated in")


class RunFileKeys(Section):
    """Top level of a run file: the batch and DeepSpeed's sections; ``refiner`` is the project's own."""

    extends: str | None = Field(None, description="another run file, relative to this one, that this one changes")
    about: str | None = Field(None, description="what this recipe was measured to do, on what, by which command")
    refiner: RefinerKeys
    train_batch_size: int = Field(
        1024, gt=0, description="global batch of an optimizer step, images: part of the recipe"
    )
    train_micro_batch_size_per_gpu: int | None = Field(
        None, gt=0, description="images a process computes at once; null: its whole share of the global batch"
    )
    gradient_clipping: float | None = Field(None, ge=0, description="largest gradient norm; null or 0: no clipping")
    zero_optimization: ZeroKeys = Field(default_factory=ZeroKeys)
    bf16: BF16Keys = Field(default_factory=BF16Keys)
    data_types: DataTypesKeys | None = Field(None, description="see below")
    activation_checkpointing: ActivationCheckpointingKeys | None = Field(None, description="see below")
    flops_profiler: FlopsProfilerKeys | None = Field(None, description="see below")
    comms_logger: CommsLoggerKeys | None = Field(None, description="see below")
    communication_data_type: Literal["fp32", "bf16"] | None = Field(None, description="type gradients are reduced in")
    prescale_gradients: bool | None = Field(None, description="DeepSpeed's")
    gradient_predivide_factor: float | None = Field(None, gt=0, description="DeepSpeed's")
    steps_per_print: int | None = Field(None, gt=0, description="DeepSpeed's own progress lines, into the log file")
    wall_clock_breakdown: bool | None = Field(None, description="DeepSpeed's own timers, into the log file")
    memory_breakdown: bool | None = Field(None, description="DeepSpeed's")
    dump_state: bool | None = Field(None, description="DeepSpeed's")

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _bare_stage(cls, value: Any) -> Any:
        # DeepSpeed once took a bare boolean here; a sentence about the object is more useful than a type error.
        if isinstance(value, bool):
            raise ValueError('must be an object such as {"stage": 1}')
        return value
