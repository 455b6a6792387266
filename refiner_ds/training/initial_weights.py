"""The weights a run starts from: those of another run, a checkpoint or a file, fitted to this run's model.

    refiner.model.init_from ── read ── positions resized, heads matched ── checked ──> model

Score-map targets need nothing here: they are computed on the model's own patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from refiner_ds.checkpoint.files import CLASSES, find_checkpoint, read_classes, read_weights
from refiner_ds.config import RunFile
from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.models import RefinedViT
from refiner_ds.models.patterns import matching
from refiner_ds.models.released import fit_weights, read_weight_file
from refiner_ds.run_folder import RunFolder


def starts_fresh(run: RunFile) -> bool:
    """Whether a run begins, rather than resumes: ``init_from`` matters then alone."""
    return not RunFolder(run.folder).saved_checkpoints()


def initial_weights(run: RunFile, model: RefinedViT, classes: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """What ``refiner.model.init_from`` gives ``model``: a state dict, and what was adapted, a sentence each.

    Args:
        model: may be on the meta device; it is not changed.
        classes: of the training set; heads of a checkpoint that names others start afresh.
    Raises:
        ConfigError: there is no such place, it cannot be read, or it does not fit the model; one sentence.
    """
    keys = run.refiner.model
    assert keys.init_from is not None
    place = Path(keys.init_from)
    if not place.exists():
        raise ConfigError(
            f"{run.path}: refiner.model.init_from {place} does not exist; give a run folder, a checkpoint or a file"
        )
    try:
        matching(keys.init_layers or (), model.state_dict())
    except ValueError as error:
        raise ConfigError(f"{run.path}: refiner.model.init_layers: {error}") from None
    try:
        content, names = _read(place)
        others = names is not None and list(names) != list(classes)
        reset_head = keys.reset_head or others
        state, notes = fit_weights(model, content, str(place), reset_head=reset_head, layers=keys.init_layers)
    except (ValueError, CheckpointError) as error:
        raise ConfigError(f"{run.path}: refiner.model.init_from: {error}") from None
    if others and not keys.reset_head and len(names or ()) == len(classes):
        notes = [note.replace(", as asked", ": its classes have other names") for note in notes]
    return state, notes


def _read(place: Path) -> tuple[Mapping[str, Any], list[str] | None]:
    if not place.is_dir():
        return read_weight_file(place), None
    checkpoint = find_checkpoint(place)
    names = read_classes(checkpoint) if (checkpoint / CLASSES).is_file() else None
    return read_weights(checkpoint, "ema"), names
