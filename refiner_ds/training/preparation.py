"""Everything about a run that can be checked, and refused, before a process group or a file of its own exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refiner_ds.checkpoint.writing import checkpoint_bytes
from refiner_ds.config import BatchSplit, RunFile
from refiner_ds.data.classes import match_classes
from refiner_ds.data.index import ShardIndex, find_maps
from refiner_ds.data.locate import open_index
from refiner_ds.errors import DataError
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.build import build_model
from refiner_ds.training.data_identity import refuse_other_data
from refiner_ds.training.initial_weights import initial_weights, starts_fresh
from refiner_ds.training.resuming import refuse_another_run, refuse_full_disk, refuse_unfit_checkpoint
from refiner_ds.training.schedule import Schedule
from refiner_ds.training.world import World


@dataclass(frozen=True)
class Preparation:
    """A run that can start.

    Attributes:
        val: the validation set, its labels numbered as the training set's.
        val_note: how its classes were matched to the training set's; "" where both lists are the same.
    """

    run: RunFile
    batch: BatchSplit
    train: ShardIndex
    maps: ShardIndex | None
    val: ShardIndex | None
    val_note: str
    schedule: Schedule

    @property
    def num_classes(self) -> int:
        """Outputs of the model's heads."""
        return self.run.refiner.model.num_classes or len(self.train.classes)

    @property
    def sets(self) -> list[ShardIndex]:
        """Every shard set that the run reads, once each."""
        return [index for index in (self.train, None if self.maps is self.train else self.maps, self.val) if index]

    def finished(self) -> str | None:
        """What to tell a person whose run is complete already; None where there is something left to train."""
        summary = RunFolder(self.run.folder).reached()
        if summary is None or summary["step"] < self.schedule.total_steps:
            return None  # a damaged one is written again: the run resumes where its newest checkpoint is
        ema = summary.get("ema")
        top1 = ema.get("top1") if isinstance(ema, dict) else None
        reached = f", top-1 {top1:.2f} % (EMA weights)" if isinstance(top1, float) else ""
        return (
            f"{self.run.folder} is complete: {summary['step']} steps{reached}; begin another with"
            " --set refiner.run.name=NAME, or train this one further with a larger refiner.recipe.epochs"
        )


def prepare(run: RunFile, world_size: int) -> Preparation:
    """Check a run file against this machine, its data and its run folder.

    Raises:
        ConfigError, DataError, CheckpointError: one sentence; nothing has been written.
    """
    batch = run.batch(world_size)
    with torch.device("meta"):
        build_model(run, run.refiner.model.num_classes or 10)
    RunFolder(run.folder).refuse_unwritable()
    RunFolder(run.folder).refuse_misplaced()
    refuse_another_run(run)
    train = load_index(run.refiner.data.train, run)
    maps = _score_maps(run, train)
    refuse_other_data(run, train, maps)
    _refuse_disagreement(run, train)
    val, val_note = _validation_set(run, train)
    ready = Preparation(run, batch, train, maps, val, val_note, Schedule(run.refiner.recipe, batch, train.count))
    if run.refiner.model.init_from is not None and starts_fresh(run):
        with torch.device("meta"):
            model = build_model(run, ready.num_classes)
        initial_weights(run, model, train.classes)
    if ready.finished() is None:
        with torch.device("meta"):
            shapes = {name: one.shape for name, one in build_model(run, ready.num_classes).state_dict().items()}
        refuse_unfit_checkpoint(RunFolder(run.folder), shapes, list(train.classes))
        refuse_full_disk(RunFolder(run.folder), checkpoint_bytes(shapes.values()))
    return ready


def load_index(place: str, run: RunFile) -> ShardIndex:
    """The index of a folder or of a ``package:`` set, which is made on first use; its files are not looked at."""
    return open_index(place, run.refiner.data.cache, check_files=False)


def refuse_missing_files(run: RunFile, sets: list[ShardIndex], world: World | None = None) -> None:
    """Compare the size of every shard with the index, once on each node; all processes are refused together.

    A run that skips damaged samples starts with a shard missing, too, and counts what it held.

    Args:
        world: the open process group, every process of which must call this; None: this process alone.
    Raises:
        DataError: a shard is missing or not as long as the index says, here or on another node.
    """
    looks = run.refiner.data.on_bad_sample == "error" and (world is None or world.local_rank == 0)
    error = next((error for index in sets for error in index.file_errors()), None) if looks else None
    if world is not None:
        error = world.first(error)
    if error is not None:
        raise DataError(error)


def _score_maps(run: RunFile, train: ShardIndex) -> ShardIndex | None:
    if not run.refiner.data.score_maps:
        return None
    elsewhere = run.refiner.data.maps
    return find_maps(train, load_index(elsewhere, run) if elsewhere else None, check_files=False)


def _validation_set(run: RunFile, train: ShardIndex) -> tuple[ShardIndex | None, str]:
    if run.refiner.data.val is None:
        return None, ""
    val = load_index(run.refiner.data.val, run)
    match = match_classes(val.classes, train.classes, str(val.folder))
    return val.with_classes(train.classes, match.labels) if match.note else val, match.note


def _refuse_disagreement(run: RunFile, train: ShardIndex) -> None:
    said, classes = run.refiner.data.images, run.refiner.model.num_classes
    if said is not None and said != train.count:
        raise DataError(f"{train.folder}: holds {train.count} images where {run.path} says refiner.data.images {said}")
    if classes is not None and classes < len(train.classes):
        raise DataError(
            f"{train.folder}: names {len(train.classes)} classes, more than refiner.model.num_classes {classes};"
            f" set it to {len(train.classes)} or null"
        )
