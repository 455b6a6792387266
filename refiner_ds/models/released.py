"""Load weights under the released names into a model, fitted to its picture size and number of classes.

file or dict ── unwrap ── resize positions ── drop heads of other classes ── check every name and shape ──> model
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from refiner_ds.models.refined_vit import RefinedViT

__all__ = ["fit_to", "load_released_weights", "read_weights"]

State = Mapping[str, Tensor]
WRAPPINGS = ("state_dict_ema", "state_dict", "model")
HEADS = ("head", "aux_head")


def load_released_weights(model: RefinedViT, path_or_state_dict: str | Path | Mapping[str, Any]) -> list[str]:
    """Load a checkpoint with the released state-dict names, with or without the usual wrappings.

    The position embedding is resized to the model's grid, its class entry kept. Where the number of classes differs
    both heads keep their fresh initialisation.

    Args:
        model: a :class:`RefinedViT`, not fused.
        path_or_state_dict: a ``.safetensors`` file, one written by ``torch.save`` (no pickled code is run), or a dict.
    Returns:
        What was adapted, a sentence each; each is also a warning.
    Raises:
        ValueError: a file that cannot be read; names left over or missing, all listed; or shapes that differ.
    """
    given = path_or_state_dict
    source = "the state dict" if isinstance(given, Mapping) else str(given)
    state, notes = fit_to(model, given if isinstance(given, Mapping) else read_weights(Path(given)))
    own = model.state_dict()
    if misfits := _misfits(own, state):
        raise ValueError(f"{source} does not fit the model; {'; '.join(misfits)}")
    model.load_state_dict({**own, **state})
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return notes


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file, without running code that may be pickled in it.

    Raises:
        ValueError: the file is missing, or is not a checkpoint of plain tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a .safetensors, .pth or .tar file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # timm's and DeiT's checkpoints carry the command line they were made with: a bare container, and harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights ({_first_sentence(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it should hold a dict of tensors")
    return content


def fit_to(model: RefinedViT, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Unwrap a checkpoint and fit it to the model's picture size and classes.

    Returns:
        The state dict, and what was adapted, a sentence each.
    """
    state, notes = _unwrap(content), []
    own = model.state_dict()
    positions = state.get("pos_embed")
    if positions is not None and positions.dim() == 3 and positions.shape[1] != own["pos_embed"].shape[1]:
        resized = resample_abs_pos_embed(positions.float(), list(model.patch_grid), num_prefix_tokens=1)
        state["pos_embed"] = resized.to(positions.dtype)
        rows, columns = model.patch_grid
        notes.append(f"position embedding resized from {positions.shape[1] - 1} patches to {rows}x{columns}")
    classes = state["head.weight"].shape[0] if "head.weight" in state else model.num_classes
    if classes != model.num_classes:
        state = {name: value for name, value in state.items() if name.split(".")[0] not in HEADS}
        state |= {name: value for name, value in own.items() if name.split(".")[0] in HEADS}
        notes.append(f"heads start afresh: the checkpoint has {classes} classes and the model {model.num_classes}")
    return state, notes


def _misfits(own: State, state: State) -> list[str]:
    missing = sorted(name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    left_over = sorted(state.keys() - own.keys())
    wrong = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "left over": left_over, "of another shape": wrong}
    return [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for wrapping in WRAPPINGS:
        if isinstance(content.get(wrapping), Mapping):
            return _unwrap(content[wrapping])
    state = dict(content)
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__
