"""``python -m refiner_ds.benchmark scale``: what opening a very large set costs one rank of 1,024.

The members table is a sparse file of its true length: reading it costs what reading the real one would, but the disk
holds nothing. Every set is opened in a fresh process, so that memory is counted from nothing.

    open      read index.json, map members.npy
    seek      sample numbers of the middle of epoch 8 for rank 1,023, first call
    again     the same elsewhere in that epoch
    records   shard, offset and label of those 16 samples, never read before
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from refiner_ds.command_line import Parser
from refiner_ds.data.index import FORMAT, INDEX_NAME, MEMBERS_NAME, VERSION, ShardIndex
from refiner_ds.data.sampler import TrainSampler
from refiner_ds.data.tar_format import MEMBER
from refiner_ds.errors import ConfigError

SAMPLES_PER_SHARD = 10_000
REPEATS = 30


def make_index(folder: Path, count: int, shards: int) -> None:
    """Write an index of ``count`` samples whose members table is sparse; there are no tars."""
    each, spare = divmod(count, shards)
    table = folder / MEMBERS_NAME
    with open(table, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": MEMBER.descr, "fortran_order": False, "shape": (count,)})
        file.truncate(file.tell() + count * MEMBER.itemsize)
    shard = {"bytes": each * 110_000, "sha256": "0" * 64, "keys_sha256": "0" * 64}
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "count": count,
        "maps": None,
        # Tables of a billion samples are too long to be hashed at every start.
        "members_sha256": hashlib.sha256(table.read_bytes()).hexdigest() if count < 10**7 else "",
        "classes": [f"n{number:08d}" for number in range(1000)],
        "shards": [
            {"name": f"shard-{number:06d}.tar", "count": each + (number < spare), **shard} for number in range(shards)
        ],
    }
    (folder / INDEX_NAME).write_text(json.dumps(stored))


def measure(folder: Path) -> dict[str, float]:
    """Milliseconds of every step of this file's head, and MiB of private memory, in this process."""
    before, began = _private_mebibytes(), time.perf_counter()
    index = ShardIndex.load(folder, check_files=False)
    opened = time.perf_counter()
    sampler = TrainSampler(index.count, 16384, 16, 1023, 1024, 42)
    middle = 7 * sampler.steps_per_epoch + sampler.steps_per_epoch // 2
    samples = sampler[middle].samples_B.tolist()
    sought = time.perf_counter()
    for sample in samples:
        index.shard_of(sample), index.members[sample].item()
    found = time.perf_counter()
    memory = _private_mebibytes() - before
    again = []
    for number in range(REPEATS):
        start = time.perf_counter()
        sampler[middle + 17 * (number + 1)]
        again.append(time.perf_counter() - start)
    milliseconds = {"open": opened - began, "seek": sought - opened, "again": median(again), "records": found - sought}
    return {name: 1000 * seconds for name, seconds in milliseconds.items()} | {"MiB": memory}


def _private_mebibytes() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file. Returns 0."""
    parser = Parser(
        prog="refiner_ds.benchmark scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1_281_000, 1_000_000_000], help="sizes of the sets")
    given = parser.parse_args(argv)
    if min(given.samples) < SAMPLES_PER_SHARD:
        raise ConfigError(f"--samples {min(given.samples)}: must be at least {SAMPLES_PER_SHARD}")
    columns = ("open", "seek", "again", "records", "MiB")
    print(f"{'samples':>15}" + "".join(f"{name if name == 'MiB' else name + ' ms':>12}" for name in columns))
    for count in given.samples:
        with tempfile.TemporaryDirectory(prefix="refiner_ds-scale-") as folder:
            make_index(Path(folder), count, count // SAMPLES_PER_SHARD)
            fresh = [sys.executable, "-c", f"from {__name__} import *; print(json.dumps(measure(Path({folder!r}))))"]
            figures = json.loads(subprocess.run(fresh, capture_output=True, text=True, check=True).stdout)
        print(f"{count:15,}" + "".join(f"{figures[name]:12.2f}" for name in columns))
    return 0
