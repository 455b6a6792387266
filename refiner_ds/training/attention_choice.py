"""``refiner.model.attention: auto``: which backend computes each kind of attention in this run, and why.

    a choice in the run folder, of this machine and these shapes ──> kept, so that a resumed run is the same to the bit
    else layers too small to matter                              ──> by rule
    else times, from the cache or measured now                   ──> the fastest

One process decides for all. The run folder's attention.json has a line for each machine and shape; the cache has
times by device, driver, versions, code and shapes. Checkpoints know nothing of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refiner_ds.attention import kernels_verified, use_backends
from refiner_ds.attention.choice import Layer, Measured, best_of, by_rule, candidates, entries, measure
from refiner_ds.cache import cache_folder
from refiner_ds.config import RunFile
from refiner_ds.files import write_atomically
from refiner_ds.memory import free_memory
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.attention_cases import attention_kinds
from refiner_ds.training.attention_times import cache_name, keep_times, read_times
from refiner_ds.training.build import build_model
from refiner_ds.training.console import log
from refiner_ds.training.machine import device_name
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World

SMALL = 2**17  # entries of a layer's maps of a micro-batch: fewer take a CPU about as long whatever their number is
SECONDS = 3.0  # for timing, all kinds together


class Choice(NamedTuple):
    """What computes each kind of attention, and why, in a few words for the header."""

    backends: dict[str, str]
    why: str


def choose_backends(ready: Preparation, world: World, bf16: bool, before: dict[str, Any] | None) -> str:
    """Let this process compute attention by what the main process chooses; every rank must call it.

    Args:
        bf16: whether the engine trains in bf16.
        before: the resolved run file of the start before; None where this is the first.
    Returns:
        why, for the header; "" where nothing is left to choose.
    """
    use_backends({})
    if ready.run.refiner.model.attention != "auto":
        return ""
    asked = bool(os.environ.get("REFINER_ATTENTION"))
    kernels = all(world.gather(not asked and kernels_verified(world.device)))
    choice = None
    if world.is_main and not asked:
        try:
            choice = _choose(ready, world, bf16, before, kernels)
        except Exception:  # a run must not fail for want of a faster way
            log.exception("attention: nothing is chosen, because choosing failed")
    choice = world.broadcast(choice)
    if choice is None:
        return ""
    use_backends(choice.backends)
    return choice.why


def _choose(ready: Preparation, world: World, bf16: bool, before: dict[str, Any] | None, kernels: bool) -> Choice:
    run, file = ready.run, RunFolder(ready.run.folder).attention
    with torch.device("meta"):
        model = build_model(run, ready.num_classes)
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = attention_kinds(run, model, world, dtype, ready.batch.micro_batch)
    layers = [one for one in found.values() if isinstance(one, Layer)]
    keys = run.refiner.model
    here = {
        "device": device_name(world.device), "bf16": bf16, "images": ready.batch.micro_batch,
        "checkpointing": keys.checkpointing, "save_for_backward": keys.save_for_backward,
    }  # fmt: skip
    records = _read_records(file)
    kept = next((one for one in reversed(records) if one["where"] == here), None)
    if kept is not None and _holds(kept["backends"], layers, kernels):
        backends = {layer.kind: kept["backends"][layer.kind] for layer in layers}
        return Choice(backends, "as chosen when the run first trained here")
    if not records and before is not None and _began_without_choice(before):
        choice = Choice({layer.kind: candidates(layer, kernels)[0] for layer in layers}, "the default, as it began")
    else:
        choice = _decide(run, layers, world, kernels)
    if records:
        last = records[-1]["where"]
        differ = ", ".join(
            f"{key} is {here[key]} and was {last.get(key)}" for key in here if here[key] != last.get(key)
        )
        choice = choice._replace(why=f"chosen anew, {differ or 'since what was chosen is not possible any more'}")
    records = [one for one in records if one["where"] != here]
    records.append({"where": here, "backends": choice.backends, "why": choice.why})
    write_atomically(file, json.dumps(records, indent=1) + "\n")
    return choice


def _began_without_choice(before: dict[str, Any]) -> bool:
    """Whether a run was begun by the default, before there was a choice."""
    return before.get("refiner", {}).get("model", {}).get("attention") is None


def _read_records(file: Path) -> list[dict[str, Any]]:
    """What was chosen before; nothing where the file is missing or damaged."""
    try:
        records = json.loads(file.read_text())
        assert all(isinstance(one["where"], dict) and _are_backends(one["backends"]) for one in records)
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        return []
    return list(records)


def _are_backends(chosen: Any) -> bool:
    return isinstance(chosen, dict) and all(isinstance(name, str) for name in chosen.values())


def _holds(chosen: dict[str, str], layers: list[Layer], kernels: bool) -> bool:
    """Whether a choice names a backend for each kind, and each is possible here."""
    return all(chosen.get(layer.kind) in candidates(layer, kernels) for layer in layers)


def _decide(run: RunFile, layers: list[Layer], world: World, kernels: bool) -> Choice:
    if all(entries(layer) < SMALL for layer in layers):
        return Choice({layer.kind: by_rule(layer, kernels) for layer in layers}, "by rule: too small to time")
    seconds, chosen = SECONDS / max(len(layers), 1), {}
    cache = cache_folder(run.refiner.data.cache) / "attention"
    free, lines, compared = _free(world), [], False
    for layer in layers:
        name = cache_name(layer, kernels)
        measured = read_times(cache / name, layer, free)
        if measured is None:
            devices = [world.device] if world.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):  # dropout must not move what comes after
                measured = measure(layer, free, seconds, kernels)
            keep_times(cache, name, measured)
        chosen[layer.kind] = best_of(measured)
        lines += table(measured, chosen[layer.kind], layer.images)
        compared |= any(one.milliseconds is not None for one in measured.candidates)
    log.info("attention: each kind timed forward and backward\n%s", "\n".join([HEADING, *lines]))
    why = "the fastest here; times are" if compared else "nothing else fits into memory; bytes are"
    return Choice(chosen, f"{why} in logs/rank_0.log")


HEADING = f"  {'kind':<12}{'candidate':<16}{'images':>8}{'ms':>10}{'MiB saved':>11}"


def table(measured: Measured, chosen: str, images: int) -> list[str]:
    """A line for each candidate."""
    lines = []
    for one in measured.candidates:
        time = "" if one.milliseconds is None else f"{one.milliseconds:.2f}"
        saved = "" if one.saved is None else f"{one.saved / 2**20:.1f}"
        compiled = "" if one.compiling is None else f"compiled and ran first in {one.compiling:.1f} s"
        note = one.reason or ", ".join(x for x in ("chosen" if one.backend == chosen else "", compiled) if x)
        shown = str(measured.images) if measured.images == images else f"{measured.images}/{images}"
        lines.append(f"  {measured.kind:<12}{one.backend:<16}{shown:>8}{time:>10}{saved:>11}  {note}".rstrip())
    return lines


def _free(world: World) -> int:
    """Bytes of the device's memory that a process may count on: a CPU's are shared out among a node's processes."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE") or world.size)
