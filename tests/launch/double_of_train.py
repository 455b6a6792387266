"""Stands in for ``refiner_ds/train.py`` in a clone of the tests: writes down who it is, and leaves as it is told.

    <run folder>/seen/<rank>.<attempt>.json     environment, arguments, where the code came from, sum over ranks

``<output>/behaviour.json`` says how. {"reduce": true}: the ranks meet in an all-reduce first. {"<rank>": […]}:
one entry an attempt, 0 beyond the list: a number to leave with, or a word: "raise", "hang" (until killed), "saved"
(75 once it was signalled), "early" (a signal finds no handlers of training yet), "late" (3, once the others have
begun) or "step" (a new checkpoint, then 75).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

KEYS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GREETING"),
)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--ready" in words or "--check" in words:
        return 0
    from refiner_ds.config import load

    run = load(words[words.index("--config") + 1])
    file = run.folder.parent / "behaviour.json"
    behaviour = json.loads(file.read_text()) if file.exists() else {}
    seen, rank = run.folder / "seen", os.environ["RANK"]
    seen.mkdir(parents=True, exist_ok=True)
    attempt = len(list(seen.glob(f"{rank}.*.json")))
    ways = behaviour.get(rank, [])
    way = ways[attempt] if attempt < len(ways) else 0
    signalled: list[int] = []
    if way != "early":  # "early": the signal comes before training has put up its handlers
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda got, frame: signalled.append(got))
    record: dict[str, object] = {key: os.environ.get(key) for key in KEYS}
    record |= {"code": __file__, "python": sys.executable, "host": os.uname().nodename, "epochs": _epochs(run)}
    if behaviour.get("reduce"):
        record["sum"] = _sum_over_ranks()
    new = seen / f".{rank}.{attempt}.json"
    new.write_text(json.dumps(record))
    new.rename(seen / f"{rank}.{attempt}.json")
    print(f"rank {rank} of the double, attempt {attempt}", flush=True)
    return _leave(way, signalled, run.folder / "latest", attempt)


def _epochs(run: object) -> float:
    return run.refiner.recipe.epochs  # type: ignore[attr-defined]


def _sum_over_ranks() -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    one = torch.ones(1)
    dist.all_reduce(one)
    dist.destroy_process_group()
    return one.item()


def _leave(way: int | str, signalled: list[int], latest: Path, attempt: int) -> int:
    if way == "raise":
        raise RuntimeError("the double was asked to crash")
    if way == "late":
        time.sleep(2)
        return 3
    if way == "step":
        latest.write_text(f"step_{attempt:08d}\n")
        return 75
    while way in ("hang", "early") or (way == "saved" and not signalled):
        time.sleep(0.05)
    return 75 if way == "saved" else int(way)
