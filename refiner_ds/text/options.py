"""What a refined encoder's config says of its refiners, under the key ``refiner``; checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from refiner_ds.attention import expanded_maps, kernel_shapes
from refiner_ds.errors import ConfigError

__all__ = ["BEGINNINGS", "KINDS", "RefinerOptions"]

KINDS = ("linear", "bottleneck")
BEGINNINGS = ("identity", "fresh")


@dataclass(frozen=True)
class RefinerOptions:
    """The refiner of every layer.

    Args:
        kind: "linear" (the paper's, sections 3.2 and 3.3) or "bottleneck" (the released models').
        expansion_ratio: expanded maps over heads.
        kernel_size: of distributed local attention, odd.
        init: "identity": the refined model begins as the plain one; "fresh": as convolutions are drawn. ``None``:
            "identity" where there is one, which is for "linear" alone.
    Raises:
        ConfigError: one of them cannot be.
    """

    kind: str = "linear"
    expansion_ratio: float = 3
    kernel_size: int = 3
    init: str | None = None

    def __post_init__(self) -> None:
        _check_one_of("kind", self.kind, KINDS)
        if self.init is None:
            object.__setattr__(self, "init", "identity" if self.kind == "linear" else "fresh")
        _check_one_of("init", self.init, BEGINNINGS)
        if self.kind == "bottleneck" and self.init == "identity":
            raise ConfigError(
                "refiner: init is 'identity', but a bottleneck's last norm centres the maps, so it cannot begin as the"
                " plain model; take 'fresh', or kind 'linear'"
            )
        for name in ("expansion_ratio", "kernel_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "kernel_size" else int | float):
                raise ConfigError(f"refiner: {name} is {value!r}; it must be a number, such as 3")
        self.check_heads(1 / self.expansion_ratio if 0 < self.expansion_ratio < 1 else 1, whole=False)

    def check_heads(self, heads: float, whole: bool = True) -> None:
        """Refuse an encoder of so many heads that expansion makes no whole number of maps of."""
        try:
            kernel_shapes("none", self.kernel_size)
            if whole or self.expansion_ratio < 1:
                expanded_maps(int(heads), self.expansion_ratio)
        except ValueError as error:
            raise ConfigError(f"refiner: {error}") from None

    @classmethod
    def read(cls, keys: Mapping[str, Any]) -> RefinerOptions:
        """The options in a config's ``refiner``.

        Raises:
            ConfigError: a key is unknown, or its value cannot be.
        """
        known = [field.name for field in fields(cls)]
        if strangers := [name for name in keys if name not in known]:
            raise ConfigError(f"refiner: {strangers[0]} is not a key; there are {', '.join(known)}")
        return cls(**keys)

    def as_keys(self) -> dict[str, Any]:
        """The same for a config."""
        return asdict(self)


def _check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"refiner: {name} is {value!r}; it must be {' or '.join(allowed)}")
