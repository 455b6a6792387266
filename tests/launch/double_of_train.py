"""Stands in for ``refiner_ds/train.py`` in a clone of the tests: writes down who it is, and leaves as it is told.

    <run folder>/seen/<rank>.<attempt>.json     environment, arguments, where the code came from, sum over ranks

``<output>/<run>.behaviour.json`` says how. {"reduce": true}: the ranks meet in an all-reduce first. {"<rank>": […]}:
one entry an attempt, 0 beyond the list, each of them a number to leave with, or

    "raise"               an exception           "kill"      by signal 9, once the others have begun
    "hang"                until killed           "verdict"   a watchdog says that it hangs; 75
    "saved"               75, once signalled,    "full"      an error: a disk is full
                          or <run folder>/go     "step"      a new checkpoint, then 75
                          is there               "late"      3, once the others have begun
    "slowly"              as "saved", and takes six seconds to write <run folder>/seen/<rank>.saved
    "early"               as "hang"; a signal finds no handlers of training yet
    {"raise": [name, text]}       that exception
    {"say": line, "code": code}   a line on stderr, then that exit code; {"after": seconds}
    {"die": number}               of that signal
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

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
    file = run.folder.parent / f"{run.folder.name}.behaviour.json"
    behaviour = json.loads(file.read_text()) if file.exists() else {}
    seen, rank = run.folder / "seen", os.environ["RANK"]
    seen.mkdir(parents=True, exist_ok=True)
    attempt = int(os.environ.get("REFINER_RESTART_COUNT") or os.environ.get("SLURM_RESTART_COUNT", "0"))
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


def _leave_as_told(way: dict[str, Any]) -> int:
    if "raise" in way:
        name, text = way["raise"]
        raise type(name, (getattr(builtins, name, RuntimeError),), {})(text)
    if "die" in way:
        signal.signal(way["die"], signal.SIG_DFL)
        os.kill(os.getpid(), way["die"])
    time.sleep(way.get("after", 0))
    print(way["say"], file=sys.stderr, flush=True)
    return int(way["code"])


def _hang(run_folder: Path) -> int:
    """As training's watchdog ends a rank that hangs."""
    rank = int(os.environ["RANK"])
    (run_folder / "heartbeats").mkdir(exist_ok=True)
    sentence = f"no progress for 30 s: rank {rank} (process {os.getpid()} on {os.uname().nodename}) is stuck there"
    verdict = {"ranks": [rank], "sentence": sentence, "by": 0}
    (run_folder / "heartbeats/verdict.json").write_text(json.dumps(verdict))
    os._exit(75)


def _leave(way: int | str | dict[str, Any], signalled: list[int], latest: Path, attempt: int) -> int:
    if way == "raise":
        raise RuntimeError("the double was asked to crash")
    if isinstance(way, dict):
        return _leave_as_told(way)
    if way in ("late", "kill"):
        time.sleep(2)
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return 3
    if way == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(latest.parent / "checkpoints/step_00000001/model"))
    if way == "verdict":
        return _hang(latest.parent)
    if way == "step":
        latest.write_text(f"step_{attempt:08d}\n")
        return 75
    go = latest.parent / "go"
    saves = way in ("saved", "slowly")
    while way in ("hang", "early") or (saves and not signalled and not go.exists()):
        time.sleep(0.05)
    if way == "slowly":
        time.sleep(6)
        (latest.parent / "seen" / f"{os.environ['RANK']}.saved").touch()
    return 75 if saves else int(way)


if __name__ == "__main__":
    sys.exit(main())
