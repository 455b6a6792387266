"""Which options of a model fit each other; everything else refuses by itself where it is built."""

from __future__ import annotations

__all__ = ["LAYOUTS", "REFINERS", "check_options"]

LAYOUTS = ("released", "paper")
REFINERS = ("none", "linear", "bottleneck")


def check_options(
    embed_dim: int, num_heads: int, depth: int, layout: str, refiner: str, expand: bool, reduce: bool
) -> None:
    """Refuse what cannot be built.

    Raises:
        ValueError: one sentence naming the option and what would be right.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if refiner not in REFINERS:
        raise ValueError(f"refiner is {refiner!r}; it must be one of {', '.join(REFINERS)}")
    if depth < 1:
        raise ValueError(f"depth is {depth}; a model needs at least one block")
    if num_heads < 1 or embed_dim % num_heads:
        near = max(embed_dim // max(num_heads, 1), 1) * max(num_heads, 1)
        raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; {near} would be")
    if refiner == "bottleneck" and not (expand and reduce):
        raise ValueError("expand and reduce can be switched off with refiner 'linear' only, not with 'bottleneck'")
