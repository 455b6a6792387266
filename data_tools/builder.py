"""Builds a shard set from samples, wherever they come from: shards in parallel, resumable, the same bytes every time.

Image files are kept byte for byte. One that cannot be read as an image is left out. That, and whatever is unusual or
was not taken, is a line of ``notes.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from refiner_ds.data.image_tree import printable
from refiner_ds.data.index import MapFormat
from refiner_ds.data.writer import FinishedShard, ShardWriter, shard_name, write_whole
from refiner_ds.errors import DataError

from .console import Progress
from .inspection import inspect_image
from .staging import load_progress, parallel_map, publish_set, save_progress, staging_folder

NOTES_NAME = "notes.txt"


class Sample(NamedTuple):
    """An image to be written.

    Attributes:
        key: unique in the set.
        name: what people know the image by, for notes.
        image: the image file's bytes.
        label: position in the set's classes.
        score_map: a map record, or None.
    """

    key: str
    name: str
    image: bytes
    label: int
    score_map: bytes | None = None


class ShardSamples(Protocol):
    """The samples of one shard; travels to the process that writes it."""

    @property
    def count(self) -> int:
        """Samples there are, those that will be left out included."""

    def read(self) -> Iterator[Sample]:
        """The samples in order."""


@dataclass(frozen=True)
class Plan:
    """A set to be built.

    Attributes:
        source: where the samples come from, for messages.
        classes: class names in the order of the labels.
        shards: the samples of every shard.
        inputs: what decides the bytes; a folder begun from other inputs is not resumed.
        ignored: a line for everything in the source that was not taken.
        maps: the format of the score maps, where samples have them.
    """

    source: Path
    classes: list[str]
    shards: Sequence[ShardSamples]
    inputs: dict[str, object]
    ignored: list[str] = field(default_factory=list)
    maps: MapFormat | None = None


@dataclass(frozen=True)
class Inspect:
    """How closely images are inspected: see `inspect_image`."""

    decode: bool
    max_pixels: int


@dataclass(frozen=True)
class Built:
    """What is to be said of a finished set: the lines of its notes, and the classes without a sample."""

    notes: list[str]
    empty_classes: list[str]


@dataclass(frozen=True)
class _Task:
    number: int
    partial: Path
    samples: ShardSamples
    inspect: Inspect


def build_set(plan: Plan, out: Path, inspect: Inspect, processes: int) -> Built:
    """Write a whole set.

    Raises:
        DataError: the target exists or cannot be written, a source cannot be read, or no image can be read.
    """
    if out.exists():
        raise DataError(f"{printable(out)}: already exists; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    options = {"shards": len(plan.shards), "decode": inspect.decode, "max_pixels": inspect.max_pixels}
    with staging_folder(partial, plan.inputs | options):
        tasks = [_Task(number, partial, samples, inspect) for number, samples in enumerate(plan.shards)]
        finished: list[FinishedShard] = []
        notes = [f"ignored: {line}" for line in plan.ignored]
        with Progress(sum(samples.count for samples in plan.shards), printable(out.name)) as progress:
            for task, (shard, shard_notes) in zip(tasks, parallel_map(_write_shard, tasks, processes), strict=True):
                finished.append(shard)
                notes += shard_notes
                progress.update(task.samples.count)
        if notes:
            write_whole(partial / NOTES_NAME, ("\n".join(notes) + "\n").encode())
        if not sum(shard.shard.count for shard in finished):
            where = f"can be read; see {printable(partial / NOTES_NAME)}" if notes else "is in it; name another source"
            raise DataError(f"{printable(plan.source)}: not one image {where}")
        publish_set(partial, out, finished, plan.classes, plan.maps)
    labels = np.concatenate([shard.members["label"] for shard in finished])
    counts = np.bincount(labels, minlength=len(plan.classes))
    return Built(notes, [plan.classes[label] for label in np.flatnonzero(counts == 0)])


def _write_shard(task: _Task) -> tuple[FinishedShard, list[str]]:
    """Write one shard, or take it from an earlier run; returns it and one line for every image with a note."""
    if earlier := load_progress(task.partial, shard_name(task.number)):
        return earlier
    writer = ShardWriter(task.partial / shard_name(task.number))
    notes = []
    try:
        for sample in task.samples.read():
            found = inspect_image(sample.image, sample.name, task.inspect.decode, task.inspect.max_pixels)
            if found.error:
                notes.append(f"left out: {printable(sample.name)}: {found.error}")
                continue
            if found.note:
                notes.append(f"kept: {printable(sample.name)}: {found.note}")
            writer.add(sample.key, sample.image, found.extension, sample.label, sample.score_map)
        finished = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    save_progress(task.partial, finished, notes)
    return finished, notes
