"""Load weights under the released names into a model, fitted to its image size, channels and number of classes.

file or dict ── unwrap ── resize positions ── adapt channels ── match heads ── check names and shapes ──> model
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from refiner_ds.models.patterns import matching
from refiner_ds.models.refined_vit import GRID, RefinedViT

__all__ = ["fit_to", "fit_weights", "load_released_weights", "read_weight_file", "unwrap"]

State = Mapping[str, Tensor]
Grid = tuple[int, int]
WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "model.")  # data parallelism, AveragedModel and ModelEma; Lightning and other loops
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's, at any depth
HEADS = ("head", "aux_head")
# Containers of numbers, harmless to unpickle: timm's and DeiT's command line, and scalars that NumPy computed.
PLAIN: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype, np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0],
    *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SUMm"},
]  # fmt: skip


def load_released_weights(
    model: RefinedViT,
    path_or_state_dict: str | Path | Mapping[str, Any],
    old_grid: Grid | None = None,
    reset_head: bool = False,
) -> list[str]:
    """Load a checkpoint with the released state-dict names, with or without the usual wrappings and prefixes.

    The position embedding is resized to the model's patch grid, its class entry kept; the first convolution is adapted
    to the model's channels as timm does. Where the number of classes differs heads keep their fresh initialisation.

    Args:
        model: a :class:`RefinedViT`, not fused.
        path_or_state_dict: a ``.safetensors`` file, one written by ``torch.save`` (no pickled code is run), or a dict.
        old_grid: rows and columns of the checkpoint's patch grid. Needed where it is not square and the checkpoint was
            not written from these models, which save such a grid with the weights.
        reset_head: let the heads keep their fresh initialisation in any case.
    Returns:
        What was adapted, a sentence each; each is also a warning.
    Raises:
        ValueError: a file that cannot be read; names left over or missing, all listed; shapes that differ; a patch
            grid that cannot be known.
    """
    given = path_or_state_dict
    if not isinstance(given, Mapping | str | PathLike):
        raise ValueError(f"weights are a {type(given).__name__}; give the path of a file, or a dict of tensors")
    content = given if isinstance(given, Mapping) else read_weight_file(Path(given))
    source = "the state dict" if isinstance(given, Mapping) else str(given)
    state, notes = fit_weights(model, content, source, old_grid, reset_head)
    model.load_state_dict(state)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return notes


def fit_weights(
    model: RefinedViT,
    content: Mapping[str, Any],
    source: str,
    old_grid: Grid | None = None,
    reset_head: bool = False,
    layers: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """A whole state dict for ``model`` out of a checkpoint's content, and what was adapted; see the function above.

    Args:
        model: may be on the meta device; it is not changed.
        source: what errors call the checkpoint.
        layers: names, prefixes or patterns of what is taken from it; the rest of the model stays as it is. None: all.
    """
    own = model.state_dict()
    taken = set(own) if layers is None else matching(layers, own)
    try:
        if layers is None:
            state, notes = fit_to(model, content, old_grid, reset_head)
        else:
            state, notes = _fit_part(model, content, taken, old_grid, reset_head)
            notes = [f"{', '.join(layers)} alone, the rest starts afresh", *notes]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if misfits := _misfits({name: value for name, value in own.items() if name in taken}, state):
        raise ValueError(f"{source} does not fit the model; {'; '.join(misfits)}")
    return {**own, **state}, notes


def _fit_part(
    model: RefinedViT, content: Mapping[str, Any], taken: Collection[str], old_grid: Grid | None, reset_head: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """What `fit_to` makes of some names of a checkpoint; the others may fit the model or not."""
    given = {name: value for name, value in unwrap(content).items() if name in taken or name == GRID}
    heads = any(name.startswith(f"{head}.") for name in taken for head in HEADS)
    state, notes = fit_to(model, given, old_grid, reset_head, heads)
    return {name: value for name, value in state.items() if name in taken}, notes


def read_weight_file(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file, without running code that may be pickled in it.

    Raises:
        ValueError: the file is missing, a folder, or not a checkpoint of plain tensors.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of weights, such as a .safetensors or .pth file in it")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a .safetensors, .pth or .tar file of weights")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights ({_first_sentence(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it should hold a dict of tensors")
    return content


def fit_to(
    model: RefinedViT,
    content: Mapping[str, Any],
    old_grid: Grid | None = None,
    reset_head: bool = False,
    heads: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """Unwrap a checkpoint and fit it to the model's image size, channels and, where heads are wanted of it, classes.

    Returns:
        The state dict, and what was adapted, a sentence each.
    Raises:
        ValueError: the patch grid of the checkpoint is not square and not known, or ``old_grid`` contradicts it.
    """
    state, own = unwrap(content), model.state_dict()
    notes = [
        *_fit_positions(state, model, old_grid),
        *_fit_channels(state, model),
        *(_fit_heads(state, own, model, reset_head) if heads else []),
    ]
    return state, notes


def _fit_positions(state: dict[str, Tensor], model: RefinedViT, old_grid: Grid | None) -> list[str]:
    saved, positions = state.pop(GRID, None), state.get("pos_embed")
    if GRID in dict(model.named_buffers()):
        state[GRID] = torch.tensor(model.patch_grid)
    if positions is None or positions.dim() != 3:
        return []
    grid = _grid_of_positions(positions.shape[1] - 1, saved, old_grid, model.patch_grid)
    if grid == model.patch_grid:
        return []
    resized = resample_abs_pos_embed(positions.float(), list(model.patch_grid), list(grid), num_prefix_tokens=1)
    state["pos_embed"] = resized.to(positions.dtype)
    rows, columns = model.patch_grid
    before = f"{grid[0] * grid[1]} patches" if grid[0] == grid[1] else f"{grid[0]}x{grid[1]} patches"
    return [f"position embedding resized from {before} to {rows}x{columns}"]


def _grid_of_positions(patches: int, saved: object, old_grid: object, own: Grid) -> Grid:
    """The patch grid of a position embedding.

    Args:
        patches: how many it holds.
        saved, old_grid: the grid as the checkpoint and as the caller has it; ``None`` where they do not say.
        own: the model's. Where it is not square, as many patches could be its own or those of a square.
    """
    advice = "give old_grid=(rows, columns) of the images it was trained on"
    given, known = _as_grid(old_grid), _as_grid(saved)
    if old_grid is not None and given is None:
        raise ValueError(f"old_grid is {old_grid!r}; it must be the rows and columns of a patch grid, such as (2, 8)")
    if saved is not None and (known is None or known[0] * known[1] != patches):
        raise ValueError(f"{GRID} is {_numbers(saved)}, but pos_embed holds {patches} patches; one of them is damaged")
    if given is not None and given[0] * given[1] != patches:
        raise ValueError(
            f"pos_embed holds {patches} patches, where old_grid {given} has {given[0] * given[1]}; {advice}"
        )
    if given is not None and known is not None and given != known:
        raise ValueError(f"old_grid is {given}, but the checkpoint says that its patch grid is {known}; leave it out")
    if found := given or known:
        return found
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"pos_embed holds {patches} patches, which is no square grid; {advice}")
    if own != (side, side) and own[0] * own[1] == patches:
        theirs = f"{side}x{side} or the model's {own[0]}x{own[1]}"
        raise ValueError(f"pos_embed holds {patches} patches, which may be {theirs}; {advice}")
    return side, side


def _as_grid(value: object) -> Grid | None:
    numbers = _numbers(value)
    if not isinstance(numbers, tuple | list) or len(numbers) != 2:
        return None
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in numbers)
    return (int(numbers[0]), int(numbers[1])) if whole else None


def _numbers(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def _fit_channels(state: dict[str, Tensor], model: RefinedViT) -> list[str]:
    name = "patch_embed.conv1.weight"
    weight = state.get(name)
    if weight is None or weight.dim() != 4 or weight.shape[1] == model.in_chans or weight.shape[1] != 3:
        return []
    state[name] = adapt_input_conv(model.in_chans, weight)
    return [f"first convolution adapted from 3 to {model.in_chans} channels"]


def _fit_heads(state: dict[str, Tensor], own: State, model: RefinedViT, reset_head: bool) -> list[str]:
    classes = state["head.weight"].shape[0] if "head.weight" in state else model.num_classes
    if reset_head or classes != model.num_classes:
        _take_heads(state, own, HEADS)
        if reset_head:
            return ["heads start afresh, as asked"]
        return [f"heads start afresh: the checkpoint has {classes} classes and the model {model.num_classes}"]
    there, wanted = "aux_head.weight" in state, "aux_head.weight" in own
    if there == wanted:
        return []
    _take_heads(state, own, ("aux_head",))
    if wanted:
        return ["auxiliary head starts afresh: the checkpoint has none (return_dense=False)"]
    return ["auxiliary head left out: the model has none (return_dense=False)"]


def _take_heads(state: dict[str, Tensor], own: State, heads: tuple[str, ...]) -> None:
    for name in [name for name in state if name.split(".")[0] in heads]:
        del state[name]
    state.update({name: value for name, value in own.items() if name.split(".")[0] in heads})


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


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under the model's own names. Raises ValueError where it is none."""
    for wrapping in WRAPPINGS:
        if isinstance(content.get(wrapping), Mapping):
            return unwrap(content[wrapping])
    state = {WRAPPERS.sub("", str(name)): value for name, value in content.items() if name != "n_averaged"}
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    state = {name: _as_tensor(name, value) for name, value in state.items()}
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{strange[0]} is a {type(state[strange[0]]).__name__}, not a tensor; give a dict of weights")
    return state


def _as_tensor(name: str, value: Any) -> Any:
    """What NumPy or a list of numbers has made of a tensor, as one."""
    count = name.endswith("num_batches_tracked") and isinstance(value, np.number | int)
    return torch.as_tensor(value) if count or isinstance(value, np.ndarray) else value


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__
