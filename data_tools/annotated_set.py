"""A set's score maps, made by several processes shard by shard, in a folder that a later run can finish."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from refiner_ds.data.index import MapFormat, ShardIndex
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.tar_format import split_name
from refiner_ds.data.writer import FinishedShard, ShardWriter
from refiner_ds.errors import DataError

from .annotation import Chunk, Worker, chunks_of
from .annotation_settings import Settings
from .console import Progress
from .staging import load_progress, parallel_map, publish_set, save_progress, staging_folder

_worker: Worker | None = None


def _init_worker(settings: Settings, index: ShardIndex, numbers: multiprocessing.Queue[int]) -> None:
    global _worker
    _worker = Worker(settings, index, numbers.get())


def _annotate_chunk(chunk: Chunk) -> Chunk:
    assert _worker is not None
    return _worker.annotate_chunk(chunk)


def _annotated(chunks: list[Chunk], first: Worker, processes: int) -> Iterator[Chunk]:
    """The chunks in order, each as soon as its maps are written."""
    if processes == 1:
        return parallel_map(first.annotate_chunk, chunks, 1)
    start_method = "spawn"  # CUDA does not survive a fork
    numbers: multiprocessing.Queue[int] = multiprocessing.get_context(start_method).Queue()
    for number in range(processes):
        numbers.put(number)
    arguments = (first.settings, first.index, numbers)
    return parallel_map(_annotate_chunk, chunks, processes, start_method, _init_worker, arguments)


def _write_shard(index: ShardIndex, shard: int, chunks: list[Chunk], beside: bool, partial: Path) -> FinishedShard:
    """Assemble a shard from its chunks, and remember that it is done."""
    reader = SampleReader(index)
    writer = ShardWriter(partial / index.shards[shard].name)
    try:
        for chunk in chunks:
            for sample, record in zip(range(chunk.first, chunk.end), chunk.records(), strict=True):
                raw = reader.read(sample)
                if beside:
                    writer.add(raw.key, bytes(raw.image), split_name(raw.name)[1], raw.label, record)
                else:
                    writer.add_map(raw.key, record, raw.label)
        finished = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    save_progress(partial, finished, [])
    return finished


def annotate_set(index: ShardIndex, out: Path, settings: Settings, processes: int, beside: bool) -> MapFormat:
    """Annotate a whole set; returns the format of its maps.

    Raises:
        DataError: the target exists or cannot be written, a sample is damaged, the annotator does not fit the set.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; choose another folder or remove it")
    if index.is_maps_only:
        raise DataError(f"{index.folder}: holds maps without images; name the set of their images")
    first = Worker(settings, index, 0)
    map_format = first.map_format()
    options = {key: str(value) for key, value in asdict(settings).items() if key not in ("checkpoint", "decode")}
    weights, shards = first.annotator.digest(), [shard.sha256 for shard in index.shards]
    partial = out.with_name(out.name + ".partial")
    with staging_folder(partial, {"shards": shards, "beside": beside, "weights": weights, **options}):
        finished = _finish_shards(first, partial, out.name, processes, beside)
        for leftover in partial.glob("*.chunk-*"):  # of a run that was killed while it cleared them away
            leftover.unlink()
        publish_set(partial, out, finished, index.classes, map_format)
    return map_format


def _finish_shards(first: Worker, partial: Path, label: str, processes: int, beside: bool) -> list[FinishedShard]:
    """All shards in order, those of an earlier run included."""
    index = first.index
    finished = {}
    with Progress(index.count, label) as progress:
        for number, shard in enumerate(index.shards):
            if earlier := load_progress(partial, shard.name):
                finished[number] = earlier[0]
                progress.skip(shard.count)
        missing = [number for number in range(len(index.shards)) if number not in finished]
        chunks = [chunk for number in missing for chunk in chunks_of(index, number, first.settings.batch, partial)]
        progress.skip(sum(chunk.end - chunk.first for chunk in chunks if chunk.path.exists()))
        new = {chunk for chunk in chunks if not chunk.path.exists()}
        done: list[Chunk] = []
        for chunk in _annotated(chunks, first, processes) if chunks else ():
            done.append(chunk)
            progress.update(chunk.end - chunk.first if chunk in new else 0)
            if chunk.end == index.starts[chunk.shard + 1]:
                finished[chunk.shard] = _write_shard(index, chunk.shard, done, beside, partial)
                for written in done:
                    written.path.unlink()
                done = []
        for number in missing:  # shards without a sample have no chunk
            if number not in finished:
                finished[number] = _write_shard(index, number, [], beside, partial)
    return [finished[number] for number in range(len(index.shards))]
