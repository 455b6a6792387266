"""The options of a model, checked before anything is built: one sentence that names the option and a right value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from refiner_ds.attention import CONSTRAINTS

__all__ = ["LAYOUTS", "REFINERS", "check_box", "check_count", "check_options"]

LAYOUTS = ("released", "paper")
REFINERS = ("none", "linear", "bottleneck")
_COUNTS = {"in_chans": 1, "num_classes": 0, "embed_dim": 1, "depth": 1, "num_heads": 1, "kernel_size": 1}
_SWITCHES = ("qkv_bias", "expand", "reduce", "return_dense", "mix_token")
_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def check_options(options: dict[str, Any]) -> None:
    """Refuse what cannot be built.

    Args:
        options: the arguments of ``RefinedViT``, by name.
    Raises:
        ValueError: one sentence naming the option and what would be right.
    """
    for name, least in _COUNTS.items():
        check_count(name, options[name], least)
    for name in _RATES:
        if not _is_number(options[name]) or not 0 <= options[name] < 1:
            raise ValueError(f"{name} is {options[name]!r}; it must be at least 0 and below 1")
    _check_one_of("layout", options["layout"], LAYOUTS)
    _check_one_of("refiner", options["refiner"], REFINERS)
    _check_one_of("constraint", options["constraint"], CONSTRAINTS)
    _check_one_of("global_pool", options["global_pool"], ("token",))
    _check_sizes(options)
    _check_fit(options)


def _check_sizes(options: dict[str, Any]) -> None:
    for name in ("mlp_ratio", "expansion_ratio"):
        if not _is_number(options[name]) or options[name] <= 0:
            raise ValueError(f"{name} is {options[name]!r}; it must be a number above 0")
    for name in _SWITCHES:
        if not isinstance(options[name], bool | np.bool_):
            raise ValueError(f"{name} is {options[name]!r}; it must be True or False")
    scale = options["init_values"]
    if scale is not None and scale != "layout" and not _is_number(scale):
        raise ValueError(f"init_values is {scale!r}; it must be a number, None for no scale, or 'layout'")
    channels = options["stem_chs"]
    if not isinstance(channels, Sequence) or len(channels) != 3 or not all(_is_count(n, 1) for n in channels):
        raise ValueError(f"stem_chs is {channels!r}; it must be three whole numbers above 0, such as (32, 64, 128)")
    if options["kernel_size"] % 2 == 0:
        raise ValueError(f"kernel_size is {options['kernel_size']}; it must be odd, such as 1, 3 or 5")
    if int(options["embed_dim"] * options["mlp_ratio"]) < 1:
        raise ValueError(
            f"mlp_ratio {options['mlp_ratio']} leaves an MLP of width {options['embed_dim']} no hidden unit"
        )


def _check_fit(options: dict[str, Any]) -> None:
    width, heads, pairs, depth = (options[n] for n in ("embed_dim", "num_heads", "cos_reg_pairs", "depth"))
    if width % heads:
        raise ValueError(
            f"embed_dim {width} is not divisible by num_heads {heads}; {max(width // heads, 1) * heads} would be"
        )
    if options["refiner"] == "bottleneck" and not (options["expand"] and options["reduce"]):
        raise ValueError("expand and reduce can be switched off with refiner 'linear' only, not with 'bottleneck'")
    if options["mix_token"] and not options["return_dense"]:
        raise ValueError("mix_token mixes the labels of patches, which return_dense=False leaves out; switch one off")
    if not _is_number(options["cos_reg"]) or options["cos_reg"] < 0:
        raise ValueError(f"cos_reg is {options['cos_reg']!r}; it must be a number of at least 0")
    if options["cos_reg"] and depth == 1:
        raise ValueError("cos_reg compares neighbouring blocks, but the model has only one")
    if pairs is not None and not (_is_count(pairs, 1) and pairs < max(depth, 2)):
        raise ValueError(f"cos_reg_pairs is {pairs!r}; {depth} blocks have 1 to {depth - 1} neighbouring pairs")


def check_box(box: Sequence[int] | Tensor, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """A mix-token box as four numbers; refuses one that does not lie in the patch grid.

    Raises:
        ValueError: it is not (y0, x0, y1, x1) with 0 <= y0 <= y1 <= rows and 0 <= x0 <= x1 <= columns.
    """
    rows, columns = grid
    found = box.tolist() if isinstance(box, Tensor | np.ndarray) else box
    if isinstance(found, Sequence) and len(found) == 4 and all(_is_count(cell, 0) for cell in found):
        y0, x0, y1, x1 = (int(cell) for cell in found)
        if y0 <= y1 <= rows and x0 <= x1 <= columns:
            return y0, x0, y1, x1
    shown = tuple(found) if isinstance(found, list) else found
    raise ValueError(
        f"mix_box is {shown!r}; it must be (y0, x0, y1, x1) within the {rows}x{columns} patch grid,"
        " y0 <= y1 and x0 <= x1"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no number of things.

    Raises:
        ValueError: it is not a whole number of at least ``least``.
    """
    if not _is_count(value, least):
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}")
