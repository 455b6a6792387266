"""Times of attention backends, kept from run to run in the cache folder: ``<cache>/attention/<key>.json``.

The key stands for everything times depend on: device, driver, versions, this package's code, shapes and dtype. A file
that is damaged is no file, and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

import refiner_ds.attention
from refiner_ds.attention.choice import Candidate, Layer, Measured, counted_as, fits
from refiner_ds.files import write_atomically
from refiner_ds.training.console import log
from refiner_ds.training.machine import device_name, driver_version
from refiner_ds.versions import code_hash

__all__ = ["cache_name", "keep_times", "read_times"]

ATTENTION = Path(refiner_ds.attention.__file__).parent


def cache_name(layer: Layer, kernels: bool) -> str:
    """A file name that stands for everything times depend on."""
    device = layer.value_BHNd.device
    key = {
        **layer.describe(), "kernels": kernels, "device": device_name(device), "driver": driver_version(device),
        "torch": torch.__version__, "triton": _triton_version(), "code": code_hash(ATTENTION),
        "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".json"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def read_times(file: Path, layer: Layer, free: int) -> Measured | None:
    """Times of another run, where all that may be used now were taken; a damaged file is no file."""
    try:
        read = json.loads(file.read_text())
        measured = Measured(read["kind"], read["images"], [Candidate(**one) for one in read["candidates"]])
        assert measured.kind == layer.kind and measured.candidates
        for one in measured.candidates:
            if counted_as(one.backend) == measured.candidates[0].backend:
                continue  # the default and its configurations, which may take what they need
            possible = fits(layer, one, free)
            if possible and one.milliseconds is None and not one.reason.startswith("fails"):
                return None
            if not possible:
                one.milliseconds, one.reason = None, one.reason or "does not fit into a quarter of the free memory"
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        return None
    return measured


def keep_times(cache: Path, name: str, measured: Measured) -> None:
    """Keep times for other runs; a cache that cannot be written costs them a few seconds, and this run nothing."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / name, json.dumps(asdict(measured)), writer=str(os.getpid()))
    except OSError as error:
        log.info("attention: times are not kept, because %s cannot be written (%s)", cache, error.strerror)
