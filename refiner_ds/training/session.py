"""One process of a run from start to exit: open the process group, train, print what to do next, close."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import refiner_ds
from refiner_ds import garbage
from refiner_ds.attention import compiles_eager
from refiner_ds.data.workers import explain_worker_death
from refiner_ds.errors import LaunchError, print_error, report_rank_errors
from refiner_ds.exit_codes import FINISHED, REFUSED
from refiner_ds.files import write_atomically
from refiner_ds.output import lasting_output
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.attention_choice import choose_backends
from refiner_ds.training.build import choose_attention
from refiner_ds.training.console import Console, log
from refiner_ds.training.data_identity import record_data
from refiner_ds.training.engine import computes_in_bf16
from refiner_ds.training.flight_recorder import last_collective
from refiner_ds.training.header import header
from refiner_ds.training.heartbeat import FIRST_COMPILED_STEPS, FIRST_STEPS, Heartbeat
from refiner_ds.training.history import record_start
from refiner_ds.training.logs import write_logs
from refiner_ds.training.loop import Trainer
from refiner_ds.training.lost_rank import report_lost_ranks
from refiner_ds.training.parent import follow_launchers
from refiner_ds.training.preparation import Preparation, refuse_missing_files
from refiner_ds.training.resuming import config_before
from refiner_ds.training.run_lock import RunLock
from refiner_ds.training.signals import before_leaving, leave_at_once, stop_flag
from refiner_ds.training.watchdog import Watchdog, prepare_heartbeats
from refiner_ds.training.world import World, init, shutdown


def run_training(ready: Preparation) -> int:
    """Train ``ready`` together with the other processes of the group. Returns the exit code.

    Raises:
        ConfigError: refined attention cannot be computed here as the run file says.
        DataError: a shard is missing on one of the nodes.
        LaunchError: another run trains in the run folder.
    """
    folder = RunFolder(ready.run.folder)
    with lasting_output(), stop_flag() as stop:
        follow_launchers(stop.ask)
        world = init(ready.run.refiner.run.timeout_minutes)
        refuse_missing_files(ready.run, ready.sets, world)
        with _locked(folder, world):
            choose_attention(ready.run, world.device)
            write_logs(folder, world.rank)
            log.info("rank %d of %d is process %d on %s", world.rank, world.size, os.getpid(), os.uname().nodename)
            before = config_before(folder)
            chosen = choose_backends(ready, world, computes_in_bf16(ready.run, world), before)
            _print_header(ready, world, chosen)
            with _watched(ready, world) as heartbeat:
                with garbage.paused():  # DeepSpeed imports the rest of itself while it builds an engine
                    trainer = Trainer(ready, world, stop, heartbeat)
                    _record_start(ready, world, trainer, before)
                    garbage.freeze()
                try:
                    with report_rank_errors(world.rank), report_lost_ranks(folder, world), explain_worker_death():
                        code = trainer.run()
                finally:
                    trainer.close()
        if code == FINISHED and world.is_main:
            _print_summary(ready, trainer.summary)
        shutdown()
    return code


@contextmanager
def _locked(folder: RunFolder, world: World) -> Iterator[None]:
    """Keep other runs out of the run folder."""
    lock, refusal, taken_over = RunLock(folder.lock, _leave_to_another), None, None
    if world.is_main:
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            taken_over = lock.acquire()
        except LaunchError as error:
            refusal = str(error)
    if (refusal := world.broadcast(refusal)) is not None:
        raise LaunchError(refusal)
    if taken_over:
        Console(world.is_main).print(taken_over)
    with before_leaving(lambda code: lock.release()):
        try:
            yield
        finally:
            lock.release()


def _leave_to_another(sentence: str) -> None:
    """What this process would write from here on, another run writes too."""
    print_error(sentence)
    leave_at_once(REFUSED)


@contextmanager
def _watched(ready: Preparation, world: World) -> Iterator[Heartbeat]:
    """Have a watchdog look after this process, and all of them after each other."""
    keys, folder = ready.run.refiner.run, RunFolder(ready.run.folder)
    compiled = ready.run.refiner.model.compile != "none" or compiles_eager()
    heartbeat = Heartbeat(FIRST_COMPILED_STEPS if compiled else FIRST_STEPS)
    if not keys.hang_seconds:
        yield heartbeat
        return
    if world.is_main:
        prepare_heartbeats(folder.heartbeats)
    world.barrier()
    watchdog = Watchdog(
        heartbeat,
        folder.heartbeats,
        world.rank,
        world.size,
        keys.hang_seconds,
        60 * keys.timeout_minutes,
        folder.rank_stacks(world.rank),
        last_collective,
    )
    watchdog.start()
    try:
        yield heartbeat
    finally:
        watchdog.close()


def _print_header(ready: Preparation, world: World, chosen: str) -> None:
    if world.is_main:
        console = Console(prints=True)
        for about, line in header(ready, world, computes_in_bf16(ready.run, world), chosen).items():
            console.print(f"{about:<12} {line}")


def _record_start(ready: Preparation, world: World, trainer: Trainer, before: dict[str, Any] | None) -> None:
    """Write down the run file and this start, now that whatever is resumed has been."""
    changed = record_start(ready.run, world, trainer.step, trainer.engine.bf16, before)
    for key, (old, new) in changed.items():
        trainer.console.print(f"changed: {key} from {json.dumps(old)} to {json.dumps(new)}")
    if world.is_main:
        record_data(ready.run, ready.train, ready.maps)
        resolved = json.dumps(ready.run.resolved(), indent=2)
        trainer.progress.metrics.text("run file", f"```json\n{resolved}\n```", trainer.step)
        write_atomically(RunFolder(ready.run.folder).config, resolved + "\n")


def _print_summary(ready: Preparation, summary: dict[str, Any]) -> None:
    """What was reached and the commands a person types next, as they can be typed from here."""
    folder = ready.run.folder
    if "ema" in summary:
        print(
            f"finished: top-1 {summary['model']['top1']:.2f} %, EMA weights {summary['ema']['top1']:.2f} %"
            f" of {summary['ema']['images']} held-out images"
        )
    else:
        print(f"finished after {summary['step']} steps")
    print(f"run folder   {folder}")
    bin_folder = Path(sys.executable).parent
    evaluate = Path(refiner_ds.__file__).with_name("evaluate.py")
    print(f"watch        {_typed(bin_folder / 'tensorboard')} --logdir {_typed(folder.parent)}")
    print(f"evaluate     {_typed(sys.executable)} {_typed(evaluate)} {_typed(folder)}")
    print("go on        the same command with --set refiner.recipe.epochs=…, more than before", flush=True)


def _typed(path: Path | str) -> str:
    """A path as it can be typed here: the bare command where the shell finds just that, else seen from this folder."""
    if (found := shutil.which(Path(path).name)) and Path(found) == Path(path):
        return Path(path).name
    return str(path).removeprefix(f"{Path.cwd()}/")
