"""The exercise of docs/data.md on the real code: 1.28 million and a billion samples, 1,024 ranks.

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

from refiner_ds.data.index import FORMAT, INDEX_NAME, MEMBER, MEMBERS_NAME, VERSION

LOOK = """
import json, sys, time, tracemalloc
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.plan import TrainPlan
def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0])
before = anonymous()
start = time.perf_counter()
index = ShardIndex.load(sys.argv[1], check_files=False)
loaded = time.perf_counter()
plan = TrainPlan(index.count, 16384, 16, 1023, 1024, 42)
plan.wanted(0)
first = time.perf_counter()
far = plan.wanted(7 * plan.steps_per_epoch + plan.steps_per_epoch // 2)
sought = time.perf_counter()
for sample in far.samples_B.tolist():
    index.members[sample].item(), index.shard_of(sample)
found = time.perf_counter()
memory = (anonymous() - before) / 1024

def least(work):  # the least of many: the machine may be busy
    took = []
    for number in range(30):
        start = time.perf_counter()
        work(number)
        took.append(time.perf_counter() - start)
    return min(took)

again = least(lambda number: plan.wanted(7 * plan.steps_per_epoch + 17 * number))
shard = least(lambda number: [index.shard_of(sample) for sample in far.samples_B.tolist()])
tracemalloc.start()
plan.wanted(9 * plan.steps_per_epoch)
print(json.dumps({"count": index.count, "load": loaded - start, "seek": sought - first, "find": found - sought,
    "memory": memory, "again": again, "shard": shard, "order": tracemalloc.get_traced_memory()[1] / 2**20}))
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


@pytest.mark.parametrize(
    "count, shards, seconds, mebibytes", [(1_281_000, 1_281, 1.0, 12), (1_000_000_000, 100_000, 6.0, 160)]
)
def test_a_rank_of_a_thousand_starts_anywhere_at_once(
    tmp_path: Path, count: int, shards: int, seconds: float, mebibytes: float
) -> None:
    make_index(tmp_path, count, shards)
    told = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(told.stdout)
    print(seen)
    assert seen["count"] == count
    assert seen["load"] < seconds
    assert seen["seek"] < 0.05 and seen["find"] < 1.0
    assert seen["again"] < 0.002 and seen["shard"] < 0.001  # ten times what is measured
    assert seen["memory"] < mebibytes and seen["order"] < 0.1
