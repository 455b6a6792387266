"""Keys that DeepSpeed or torch cannot have together, found out by training them: docs/training.md has the table."""

from __future__ import annotations

from refiner_ds.config.schema import ModelKeys


def refused_combination(
    model: ModelKeys, stage: int, bf16: bool, accumulated_in_fp32: bool, by_deepspeed: bool
) -> str | None:
    """What is wrong with keys that are each right alone: "KEY must be …"; None where they work together.

    Args:
        stage: of ZeRO.
        bf16: whether the run may train in bf16.
        accumulated_in_fp32: whether the run file asks for gradients to be.
        by_deepspeed: whether there is an ``activation_checkpointing`` section.
    """
    compiled = model.compile != "none"
    by_deepspeed = by_deepspeed and model.checkpointing != "none"
    if compiled and stage == 3:
        return (
            'refiner.model.compile must be "none" at zero_optimization.stage 3, whose gathering of weights'
            " torch.compile cannot trace; stages 0 to 2 can be compiled"
        )
    if compiled and by_deepspeed:
        return (
            'refiner.model.compile must be "none" with an activation_checkpointing section: compiled, DeepSpeed\'s'
            " recomputation counts batches twice in running statistics; without the section torch recomputes"
        )
    if by_deepspeed and stage == 3:
        return (
            "activation_checkpointing must be null at zero_optimization.stage 3 with refiner.model.checkpointing:"
            " DeepSpeed recomputes there before it has gathered the weights; without the section torch recomputes"
        )
    if accumulated_in_fp32 and stage == 0 and bf16:
        return (
            "data_types.grad_accum_dtype must be null at zero_optimization.stage 0 in bf16: DeepSpeed accumulates in"
            " fp32 at stages 1 to 3 alone"
        )
    return None
