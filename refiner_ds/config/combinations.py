"""Keys that DeepSpeed or torch cannot have together, found out by training them: docs/training.md has the table."""

from __future__ import annotations

from refiner_ds.config.deepspeed_keys import ZeroKeys
from refiner_ds.config.schema import ModelKeys


def refused_combination(
    model: ModelKeys,
    zero: ZeroKeys,
    *,
    bf16: bool,
    accumulated_in: str | None,
    by_deepspeed: bool,
    prescales: bool,
) -> str | None:
    """What is wrong with keys that are each right alone: "KEY must be …"; None where they work together.

    Args:
        bf16: whether the run may train in bf16.
        accumulated_in: the type that gradients are to be accumulated in; None: it is left to DeepSpeed.
        by_deepspeed: whether there is an ``activation_checkpointing`` section.
        prescales: whether gradients are to be divided before they are reduced.
    """
    stage = zero.stage
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
    if stage == 0 and accumulated_in is not None and (bf16 or accumulated_in == "bf16"):
        return (
            f"data_types.grad_accum_dtype must be null at zero_optimization.stage 0{' in bf16' if bf16 else ''}:"
            " DeepSpeed accumulates in another type than the model's at stages 1 to 3 alone"
        )
    if prescales and stage >= 2 and zero.reduce_scatter is not False:
        return (
            "zero_optimization.reduce_scatter must be false with prescale_gradients or gradient_predivide_factor at"
            f" zero_optimization.stage {stage}: DeepSpeed scales before it reduces there with all-reduce alone"
        )
    return None
