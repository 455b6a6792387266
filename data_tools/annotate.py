"""Makes score maps for a shard set: the top classes a network sees at every place of every image.

    python data_tools/annotate.py shards/train                             → shards/train.maps, joined to it by key
    python data_tools/annotate.py shards/train --beside shards/relabelled  → images and maps in one set
    python data_tools/annotate.py shards/train --model dm_nfnet_f6 --size 576 --device cuda --bf16

A killed run resumes where it was, but for the few batches it had in hand, and any number of processes writes the same
bytes. Processes are spread over the GPUs in turn. At the end the command says how often an image's label is in its map.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.index import MapFormat, ShardIndex, maps_folder
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import MAX_TOP_K
from refiner_ds.data.tar_format import split_name
from refiner_ds.data.writer import FinishedShard, ShardWriter
from refiner_ds.errors import DataError, report_errors

from .agreement import measure
from .annotation import Chunk, Settings, Worker, chunks_of
from .annotators import PACKAGED
from .console import Progress
from .inspection import add_max_megapixels
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


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="annotate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    gpus = torch.cuda.device_count()
    add = parser.add_argument
    add("set", help="folder of a shard set with images")
    add("--beside", type=Path, help="write images and maps into this new set")
    add("--model", default=PACKAGED, help=f"timm classifier, or {PACKAGED} (default)")
    add("--checkpoint", type=Path, help="local weights of a timm classifier")
    add("--size", type=int, default=576, help="side images are resized to (default %(default)s)")
    add("--top", type=int, default=5, help="classes kept at a place (default %(default)s)")
    add("--batch", type=int, default=16, help="images at once (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpus else "cpu")
    add_max_megapixels(parser, "refuse larger images")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--processes", type=int, default=gpus or os.cpu_count() or 1, help="default: one per GPU, or per core")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    if min(given.size, given.top, given.batch, given.processes) < 1 or given.max_megapixels <= 0:
        raise DataError("--size, --top, --batch, --processes and --max-megapixels must be above 0")
    if given.top > MAX_TOP_K:
        raise DataError(f"--top {given.top}: a score map holds at most {MAX_TOP_K} classes a place")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: there is no GPU here; take --device cpu")
    decode = DecodeKeys(max_megapixels=given.max_megapixels)
    kind = (given.model, given.checkpoint, given.size, given.top, given.batch, given.device, given.bf16)
    index = open_index(given.set, class_folders=False)
    out = given.beside or maps_folder(index.folder)
    annotate_set(index, out, Settings(*kind, decode), given.processes, given.beside is not None)
    maps = ShardIndex.load(out)
    print(maps.describe())
    agreement = measure(maps)
    print(agreement.describe())
    for warning in agreement.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
