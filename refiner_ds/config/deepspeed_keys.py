"""DeepSpeed's own keys that a run file may hold.

DeepSpeed ignores unknown top-level keys, and unknown keys in some of its sections, so a misspelt ``gradient_cliping``
would train for a month without clipping. Here every key is declared; ``tests/config`` compares the declarations with
the installed DeepSpeed's, so that a new release cannot make them lie, and ``tests/training/test_deepspeed_keys.py``
trains and resumes with each. Left out is what does not come back from a checkpoint, or only loses precision:
round-robin gradients, quantised gathering and reducing, master weights in bf16, NVMe.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from refiner_ds.config.schema import Section


class BF16Keys(Section):
    """``bf16``: DeepSpeed's mixed precision, bf16 parameters over fp32 master weights."""

    enabled: bool | Literal["auto"] = Field(
        "auto", description="auto: on where the accelerator computes bf16 natively (not on CPUs)"
    )
    immediate_grad_update: bool | None = Field(
        None, description="add each gradient to its fp32 copy as backward produces it, not after it"
    )
    check_grad_overflow: bool | None = Field(None, description="skip a step whose gradients are not finite")


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
