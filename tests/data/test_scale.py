"""The index and the sampler at the scale of docs/data.md: 1.28 million and a billion samples, 1,024 ranks.

What each step costs in time is printed by ``python -m refiner_ds.benchmark scale``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refiner_ds.benchmark.scale import make_index

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
