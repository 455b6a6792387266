"""What a checkpoint brought for a model's refiners: all of them, or none, and of the options in the config.

transformers begins a weight anew that a checkpoint lacks, and leaves one out that the model lacks, with a warning; a
refiner of which that happens in part would compute something that nobody trained.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from refiner_ds.errors import CheckpointError
from refiner_ds.text.refiners import TextRefiner

__all__ = ["refuse_other_refiners"]


def refuse_other_refiners(model: nn.Module, place: str, loading_info: Any, ignore_shapes: bool) -> None:
    """Raise CheckpointError where a refiner was loaded in part, or in another shape.

    Args:
        model: as it was built from its config.
        place: folder or name of the checkpoint.
        loading_info: transformers' LoadStateDictInfo: missing, unexpected and mismatched keys.
        ignore_shapes: whether weights of another shape are wanted anew (``ignore_mismatched_sizes``).
    """
    refiners = {name: module for name, module in model.named_modules() if isinstance(module, TextRefiner)}
    if not refiners:
        return
    shapes = {} if ignore_shapes else {key: shape for key, shape, _ in loading_info.mismatched_keys}
    for name, refiner in refiners.items():
        own = {f"{name}.{key}" for key in refiner.state_dict()}
        missing = own & set(loading_info.missing_keys)
        strangers = [key for key in loading_info.unexpected_keys if _is_of(key, name)]
        if missing == own and not strangers:
            continue
        if missing or strangers or own & shapes.keys():
            options = ", ".join(f"{key} {value}" for key, value in refiner.options.as_keys().items() if key != "init")
            raise CheckpointError(
                f"{place}: its refiners{_described(name, shapes)} are not what the config asks for ({options}); take"
                " the options that they were saved with, or a plain checkpoint"
            )


def _is_of(key: str, name: str) -> bool:
    """Whether a checkpoint's key is of this refiner; one of the two names may lack the model's prefix."""
    before, found, _ = key.rpartition(".refiner.")
    theirs, ours = f".{before}.refiner", f".{name}"
    return bool(found) and (theirs.endswith(ours) or ours.endswith(theirs))


def _described(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """What can be told from shapes: expansion and kernel."""
    told = []
    if (shape := shapes.get(f"{name}.expand")) is not None:
        told.append(f"expansion_ratio {shape[0] / shape[1]:g}")
    if (shape := shapes.get(f"{name}.kernel")) is not None and f"{name}.expand" not in shapes:
        told.append(f"kernel_size {shape[-1]}")
    return f" ({', '.join(told)})" if told else ""
