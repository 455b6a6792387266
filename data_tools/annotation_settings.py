"""How score maps are made, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refiner_ds.config.schema import DecodeKeys

PACKAGED = "efficientnet-lite0"  # the annotator whose weights come in a package


@dataclass(frozen=True)
class Settings:
    """A model of timm or `PACKAGED`, its weights, and how it is run."""

    model: str
    checkpoint: Path | None
    size: int
    top: int
    batch: int
    device: str
    bf16: bool
    decode: DecodeKeys = DecodeKeys()
