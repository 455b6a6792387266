"""Where the time of profiled steps went, from a trace of torch.profiler: four shares that add up to 100 %.

                        on a GPU                                       on CPUs
    compute             a kernel runs, collectives' apart              an operator runs, collectives apart
    communication       a collective runs and no other kernel does     a collective runs and no operator does
    data wait           neither, and the loop waits for a batch        the loop waits for a batch, operators or not
    idle                what is left: launching, Python, the host      what is left: Python between operators

Communication that compute hides is not counted as communication: only what is exposed costs time.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STEP, DATA_WAIT = "optimizer step", "data wait"  # names of the loop's own ranges
KINDS = ("compute", "exposed communication", "data wait", "idle")
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
COLLECTIVES = ("nccl", "rccl", "gloo:", "c10d::", "record_param_comms")

Spans = list[tuple[float, float]]


def read_trace(file: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, compressed or not."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds by kind: their sum is the time from the first step's begin to the last one's end.

    Args:
        events: complete events of a trace with the loop's ranges in it.
    Raises:
        ValueError: there is no step in the trace.
    """
    steps = _spans(event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    if not steps:
        raise ValueError("the trace holds no optimizer step")
    waits = _spans(event for event in events if event["name"] == DATA_WAIT and event.get("cat") == "user_annotation")
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    begin, end = steps[0][0], steps[-1][1]
    if kernels:
        end = max(end, max(event["ts"] + event["dur"] for event in kernels))
        compute = _spans(event for event in kernels if not _is_collective(event))
        communication = _spans(event for event in kernels if _is_collective(event))
        claims = [("compute", compute), ("exposed communication", communication), ("data wait", waits)]
    else:
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        collectives = [event for event in events if _is_collective(event)]
        compute = _spans(_that_compute(operators))
        claims = [("data wait", waits), ("compute", compute), ("exposed communication", _spans(collectives))]
    found = dict.fromkeys(KINDS, 0.0)
    claimed: Spans = []
    for kind, spans in claims:
        before = _length(claimed)
        claimed = _merged([*claimed, *_within(spans, begin, end)])
        found[kind] = _length(claimed) - before
    found["idle"] = (end - begin) - _length(claimed)
    return {kind: max(found[kind], 0.0) for kind in KINDS}


def in_words(found: dict[str, float]) -> str:
    """ "compute 81.2 %, exposed communication 12.0 %, data wait 3.1 %, idle 3.7 %": tenths that add up to 100."""
    total = sum(found.values())
    exact = {kind: 1000 * found[kind] / total for kind in KINDS}
    tenths = {kind: int(value) for kind, value in exact.items()}
    for kind in sorted(KINDS, key=lambda kind: tenths[kind] - exact[kind])[: 1000 - sum(tenths.values())]:
        tenths[kind] += 1  # the largest remainders
    return ", ".join(f"{kind} {tenths[kind] / 10:.1f} %" for kind in KINDS)


def _is_collective(event: dict[str, Any]) -> bool:
    return event["name"].startswith(COLLECTIVES)


def _that_compute(operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Operators without the ones around a collective: backward's hooks run, and wait for it, inside of them."""
    collectives: dict[Any, list[float]] = defaultdict(list)
    for event in operators:
        if _is_collective(event):
            collectives[event["tid"]].append(event["ts"])
    for begins in collectives.values():
        begins.sort()

    def contains_one(event: dict[str, Any]) -> bool:
        begins = collectives[event["tid"]]
        first = bisect_right(begins, event["ts"])
        return first < len(begins) and begins[first] <= event["ts"] + event["dur"]

    return [
        event
        for event in operators
        if not _is_collective(event)
        and not event["name"].startswith("autograd::engine::evaluate_function")
        and not contains_one(event)
    ]


def _spans(events: Iterable[dict[str, Any]]) -> Spans:
    return _merged([(event["ts"], event["ts"] + event["dur"]) for event in events])


def _within(spans: Spans, begin: float, end: float) -> Spans:
    return [(max(a, begin), min(b, end)) for a, b in spans if b > begin and a < end]


def _merged(spans: Spans) -> Spans:
    merged: Spans = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], b))
        else:
            merged.append((a, b))
    return merged


def _length(spans: Spans) -> float:
    return sum(b - a for a, b in spans)
