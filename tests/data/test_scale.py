"""The index and the sampler at the scale of docs/data.md: 1.28 million and a billion samples, 1,024 ranks.

The members table of the billion is a sparse file of its true length: reading it costs what reading the real one would,
but the disk holds nothing.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refiner_ds.data.index import FORMAT, INDEX_NAME, MEMBERS_NAME, VERSION
from refiner_ds.data.tar_format import MEMBER

LOOK = """
import json, sys, tracemalloc
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.sampler import TrainSampler

def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0])

before = anonymous()
index = ShardIndex.load(sys.argv[1], check_files=False)
sampler = TrainSampler(index.count, 16384, 16, 1023, 1024, 42)
far = sampler[7 * sampler.steps_per_epoch + sampler.steps_per_epoch // 2].samples_B.tolist()
shards = [index.shard_of(sample) for sample in far]
offsets = [int(index.members[sample]["offset"]) for sample in far]
memory = (anonymous() - before) / 1024
tracemalloc.start()
sampler[9 * sampler.steps_per_epoch]
print(json.dumps({"count": index.count, "memory": memory, "samples": far, "shards": shards, "offsets": offsets,
    "permutation": tracemalloc.get_traced_memory()[1] / 2**20}))
"""


def make_index(folder: Path, count: int, shards: int) -> None:
    """An index of ``count`` samples, with a sparse members table."""
    each = count // shards
    entries = [
        {
            "name": f"shard-{n:06d}.tar",
            "count": each,
            "bytes": each * 110_000,
            "sha256": "0" * 64,
            "keys_sha256": "0" * 64,
        }
        for n in range(shards)
    ]
    described = {
        "format": FORMAT, "version": VERSION, "count": count, "maps": None, "members_sha256": "", "shards": entries,
        "classes": [f"n{number:08d}" for number in range(1000)],
    }  # fmt: skip
    with open(folder / MEMBERS_NAME, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": MEMBER.descr, "fortran_order": False, "shape": (count,)})
        file.truncate(file.tell() + count * MEMBER.itemsize)
    if count < 10**7:
        described["members_sha256"] = hashlib.sha256((folder / MEMBERS_NAME).read_bytes()).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps(described))


@pytest.mark.parametrize("count, shards, mebibytes", [(1_281_000, 1_281, 12), (1_000_000_000, 100_000, 160)])
def test_a_rank_of_a_thousand_starts_anywhere_with_little_memory(
    tmp_path: Path, count: int, shards: int, mebibytes: float
) -> None:
    make_index(tmp_path, count, shards)
    finished = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(finished.stdout)
    assert seen["count"] == count
    assert seen["memory"] < mebibytes and seen["permutation"] < 0.1
    assert len(set(seen["samples"])) == 16 and all(0 <= sample < count for sample in seen["samples"])
    assert seen["shards"] == [sample // (count // shards) for sample in seen["samples"]]
    assert seen["offsets"] == [0] * 16
