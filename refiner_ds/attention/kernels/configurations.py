"""Tile configurations: other sizes for some kernels than those at the heads of their files.

    constants at the head of a kernel's file  <  CARDS, by architecture  <  CONFIGURATIONS, the one in use

A configuration belongs to a kind of attention. One of each kind is in use in this process, forward and backward: that
of the backend's name, "triton[tall]", which a run chooses by timing. All give the same numbers to rounding. Needs no
Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["CARDS", "CONFIGURATIONS", "configurations_of", "in_use", "joined", "parted", "sizes_of", "use", "using"]

Sizes = Mapping[str, int]

# Kind of attention -> name -> kernel -> the sizes that differ. Chosen by compiling for Hopper, bf16, S at 224; only a
# clock can say which is the fastest, so a run on a GPU times them.
CONFIGURATIONS: dict[str, dict[str, dict[str, Sizes]]] = {
    "bottleneck": {
        # Fewer rows computed twice, and 2 % fewer instructions; the scratch memory of a program doubles.
        "tall": {
            "expand_local": {"SEGMENT": 99},
            "bwd_expand_local": {"ROWS": 32},
            "reduce": {"POSITIONS": 16, "STEPS": 64, "num_warps": 1},
        },
        # More warps fit on a multiprocessor (expand_local: 16 instead of 11), for a third more instructions there, and
        # the scratch memory halves.
        "narrow": {
            "expand_local": {"KEYS": 4},
            "bwd_expand_local": {"ROWS": 8},
            "reduce": {"POSITIONS": 64, "num_warps": 4},
        },
    },
    "linear": {
        # Kernel's and map's gradients in a quarter and an eighth fewer instructions, with more registers a thread.
        "few warps": {
            "mix_and_shift": {"ROWS": 16},
            "kernel_gradient": {"num_warps": 4},
            "map_gradient": {"num_warps": 4},
        },
        "long": {"kernel_gradient": {"KEYS": 16}, "map_gradient": {"KEYS": 16}},
    },
}

# Architecture -> kernel -> the sizes that differ: with the constants hundreds of bytes to kilobytes spill there. On an
# MI300 nothing spills once tiles are 16 keys wide, and a thread has 512 registers where a program has four warps.
CARDS: dict[int | str, dict[str, Sizes]] = {
    "gfx942": {
        "refine_folded": {"ROWS": 3},
        "mix_and_shift": {"ROWS": 16, "num_warps": 4, "num_stages": 1},
        "kernel_gradient": {"KEYS": 16, "num_warps": 4},
        "map_gradient": {"KEYS": 16, "num_warps": 4, "num_stages": 1},
    }
}

# Kind of attention -> the name of the configuration in use, where one is.
_in_use: dict[str, str] = {}


def configurations_of(kind: str) -> tuple[str, ...]:
    """Names of a kind's configurations beside the usual one."""
    return tuple(CONFIGURATIONS.get(kind, ()))


def in_use(kind: str) -> str:
    """The name of the configuration in use; "" for the usual one."""
    return _in_use.get(kind, "")


def use(names: Mapping[str, str]) -> None:
    """From now on, in this process, each kind's kernels are launched with these configurations.

    Args:
        names: kind -> one of :func:`configurations_of`; the usual one for kinds that are missing.
    Raises:
        ValueError: a kind has no such configuration.
    """
    for kind, name in names.items():
        if name not in configurations_of(kind):
            known = ", ".join(configurations_of(kind)) or "none"
            raise ValueError(f"{kind} has no configuration {name!r}; it has {known}")
    _in_use.clear()
    _in_use.update(names)


@contextmanager
def using(kind: str, name: str) -> Iterator[None]:
    """Inside, a kind's kernels are launched with this configuration; "" is the usual one."""
    before = dict(_in_use)
    use({**{other: one for other, one in before.items() if other != kind}, **({kind: name} if name else {})})
    try:
        yield
    finally:
        use(before)


def sizes_of(kernel: str, architecture: int | str | None, **usual: int) -> dict[str, int]:
    """The sizes that a kernel is launched with.

    Args:
        kernel: its name, without the underscore.
        architecture: 90 for Hopper, "gfx942" for an MI300; ``None`` where kernels are interpreted.
        usual: the constants at the head of its file.
    """
    found = {**usual, **CARDS.get(architecture or "", {}).get(kernel, {})}
    for kind, name in _in_use.items():
        found.update(CONFIGURATIONS[kind][name].get(kernel, {}))
    assert found.keys() == usual.keys(), f"{kernel} has no size {found.keys() - usual.keys()}"
    return found


def joined(backend: str, configuration: str) -> str:
    """ "triton[tall]", or the backend alone."""
    return f"{backend}[{configuration}]" if configuration else backend


def parted(name: str) -> tuple[str, str]:
    """What :func:`joined` made of a backend and a configuration."""
    backend, _, configuration = name.partition("[")
    return backend, configuration.removesuffix("]")
