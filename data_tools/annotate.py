"""Makes score maps for a shard set: the top classes a network sees at every place of every image.

    python data_tools/annotate.py shards/train                             → shards/train.maps, joined to it by key
    python data_tools/annotate.py shards/train --beside shards/relabelled  → images and maps in one set
    python data_tools/annotate.py shards/train --model dm_nfnet_f6 --size 576 --device cuda --bf16

A killed run resumes where it was, and any number of processes writes the same bytes. Processes are spread over the GPUs
in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds.data.augment import resize
from refiner_ds.data.index import MapFormat, ShardIndex, maps_folder
from refiner_ds.data.locate import open_index
from refiner_ds.data.normalise import normalise
from refiner_ds.data.samples import RawSample, SampleReader, decode_image
from refiner_ds.data.score_maps import MAX_CLASSES, MAX_TOP_K, ScoreMap, encode
from refiner_ds.data.tar_format import split_name
from refiner_ds.data.writer import FinishedShard, ShardWriter
from refiner_ds.errors import DataError, report_errors

from .annotators import PACKAGED, Annotator, load_annotator
from .staging import load_progress, parallel_map, publish_set, save_progress, staging_folder

LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Settings:
    """How maps are made."""

    model: str
    checkpoint: Path | None
    size: int
    top: int
    batch: int
    device: str
    bf16: bool


@dataclass(frozen=True)
class ShardTask:
    """One shard to annotate: its number, where to, and whether the images go along."""

    number: int
    partial: Path
    beside: bool


class Worker:
    """A process's annotator, on its device, and the set it annotates."""

    def __init__(self, settings: Settings, index: ShardIndex, number: int) -> None:
        torch.set_num_threads(1)  # processes are the parallelism, and one thread gives the same bits everywhere
        torch.backends.cudnn.benchmark = False
        device = settings.device
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        self.settings = settings
        self.index = index
        self.device = torch.device(device)
        self.annotator: Annotator = load_annotator(settings.model, settings.checkpoint, len(index.classes))
        self.annotator.network.to(self.device)

    @torch.inference_mode()
    def annotate_images(self, images_BHWC: np.ndarray, labels: list[int]) -> list[ScoreMap]:
        """Score maps of images [B, S, S, 3] uint8."""
        images = torch.from_numpy(images_BHWC).to(self.device)
        images_B3HW = normalise(images, self.annotator.mean, self.annotator.std, torch.float32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            logits_BChw = self.annotator.network(images_B3HW)
        top = min(self.settings.top, logits_BChw.shape[1])
        values, classes = logits_BChw.float().topk(top, dim=1)
        values_BKhw = values.clamp(-LARGEST_FP16, LARGEST_FP16).half().cpu().numpy()
        classes_BKhw = classes.to(torch.int16).cpu().numpy()
        return list(map(ScoreMap, values_BKhw, classes_BKhw, labels))

    def map_format(self) -> MapFormat:
        """The format of every map.

        Raises:
            DataError: the network predicts another number of classes than the set has, or more than a record can hold.
        """
        side, classes = self.settings.size, len(self.index.classes)
        with torch.inference_mode():
            found = self.annotator.network(torch.zeros(1, 3, side, side, device=self.device)).shape[1]
        if found != classes:
            raise DataError(
                f"--model {self.settings.model}: predicts {found} classes where the set has {classes}; "
                "choose a model trained on the set's own classes"
            )
        if classes > MAX_CLASSES:
            raise DataError(f"{self.index.folder}: {classes} classes; a score map can name {MAX_CLASSES}")
        return self.annotate_images(np.zeros((1, side, side, 3), np.uint8), [0])[0].format

    def annotate(self, task: ShardTask) -> FinishedShard:
        """Write the annotated twin of one shard, or take it from an earlier run."""
        name = self.index.shards[task.number].name
        if earlier := load_progress(task.partial, name):
            return earlier[0]
        writer = ShardWriter(task.partial / name)
        reader = SampleReader(self.index)
        start, end = self.index.starts[task.number : task.number + 2].tolist()
        try:
            for first in range(start, end, self.settings.batch):
                raws = [reader.read(sample) for sample in range(first, min(end, first + self.settings.batch))]
                for raw, score_map in zip(raws, self._annotate_samples(raws), strict=True):
                    _add(writer, raw, encode(score_map), task.beside)
            finished = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        save_progress(task.partial, finished, [])
        return finished

    def _annotate_samples(self, raws: list[RawSample]) -> list[ScoreMap]:
        side = self.settings.size
        images = np.stack([resize(decode_image(raw), side, side, "bicubic") for raw in raws])
        return self.annotate_images(images, [raw.label for raw in raws])


def _add(writer: ShardWriter, raw: RawSample, record: bytes, beside: bool) -> None:
    key, ending = raw.key, split_name(raw.name)[1]
    if beside:
        writer.add(key, bytes(raw.image), ending, raw.label, record)
    else:
        writer.add_map(key, record, raw.label)


_worker: Worker | None = None


def _init_worker(settings: Settings, index: ShardIndex, numbers: multiprocessing.Queue[int]) -> None:
    global _worker
    _worker = Worker(settings, index, numbers.get())


def _annotate(task: ShardTask) -> FinishedShard:
    assert _worker is not None
    return _worker.annotate(task)


def _results(tasks: list[ShardTask], first: Worker, processes: int) -> Iterator[FinishedShard]:
    if processes == 1:
        return parallel_map(first.annotate, tasks, 1)
    start_method = "spawn"  # CUDA does not survive a fork
    numbers: multiprocessing.Queue[int] = multiprocessing.get_context(start_method).Queue()
    for number in range(processes):
        numbers.put(number)
    return parallel_map(_annotate, tasks, processes, start_method, _init_worker, (first.settings, first.index, numbers))


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
    shards = [shard.sha256 for shard in index.shards]
    options = {key: str(value) for key, value in asdict(settings).items() if key != "checkpoint"}
    partial = out.with_name(out.name + ".partial")
    with staging_folder(partial, {"shards": shards, "beside": beside, "weights": first.annotator.digest(), **options}):
        tasks = [ShardTask(number, partial, beside) for number in range(len(shards))]
        finished = []
        with tqdm(total=index.count, unit="img", desc=out.name, disable=None) as bar:
            for shard in _results(tasks, first, processes):
                finished.append(shard)
                bar.update(shard.shard.count)
        publish_set(partial, out, finished, index.classes, map_format)
    return map_format


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="annotate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("set", help="folder of a shard set with images")
    parser.add_argument("--beside", type=Path, help="write images and maps into this new set")
    parser.add_argument("--model", default=PACKAGED, help=f"timm classifier, or {PACKAGED} (default)")
    parser.add_argument("--checkpoint", type=Path, help="local weights of a timm classifier")
    parser.add_argument("--size", type=int, default=576, help="side images are resized to (default %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes kept at a place (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images at once (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1)
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    settings = Settings(given.model, given.checkpoint, given.size, given.top, given.batch, given.device, given.bf16)
    if min(given.size, given.top, given.batch, given.processes) < 1:
        raise DataError("--size, --top, --batch and --processes must be above 0")
    if given.top > MAX_TOP_K:
        raise DataError(f"--top {given.top}: a score map holds at most {MAX_TOP_K} classes a place")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: there is no GPU here; take --device cpu")
    index = open_index(given.set)
    out = given.beside or maps_folder(index.folder)
    annotate_set(index, out, settings, given.processes, given.beside is not None)
    print(ShardIndex.load(out).describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
