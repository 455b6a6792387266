"""Train a Refined-ViT under DeepSpeed.

    deepspeed refiner_ds/train.py                                    real data, minutes on a laptop
    deepspeed refiner_ds/train.py --config ds_configs/refiner_s.json --set refiner.run.name=mine
    python refiner_ds/train.py --config F --check --world-size 32    plans a run; no data, no GPU
    torchrun --nproc_per_node 8 refiner_ds/train.py …                python refiner_ds/train.py … (one process)

Exit codes: 0 finished, 2 refused, 3 the loss is not finite, 75 asked to stop: run me again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "refiner_ds"

import argparse
import json
import os

from refiner_ds import garbage
from refiner_ds.command_line import command_parser
from refiner_ds.config import RunFile, load
from refiner_ds.errors import ConfigError, RefinerError, report_errors
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(arguments)
    run = load(options.config, options.set)
    if options.print_config:
        print(json.dumps(run.resolved(), indent=2))
        return 0
    if options.ready and (refused := ready_to_start(run, options.world_size)):
        return refused
    if options.plan_for is not None:
        print(_plan_line(run, options.plan_for))
    elif options.check:
        return _check(options)
    return 0 if options.ready or options.check else train(run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="run file (default: ds_configs/quickstart.json)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    parser.add_argument("--check", action="store_true", help="print what the run takes (refiner_ds.plan) and leave")
    parser.add_argument("--ready", action="store_true", help="check what a start would, and leave")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes to reckon with in these two")
    parser.add_argument("--gpu", default="h100", help="GPU to plan for with --check, or cpu (default: h100)")
    parser.add_argument("--plan-for", metavar="JSON", help=argparse.SUPPRESS)  # launch/submit.py's: Machines of a plan
    parser.add_argument("--print-config", action="store_true", help="print the resolved run file and leave")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser


def _check(options: argparse.Namespace) -> int:
    from refiner_ds.plan.__main__ import main as plan

    config = ["--config", options.config] if options.config else []
    sets = [word for override in options.set for word in ("--set", override)]
    return plan([*config, *sets, "--gpus-per-node", str(options.world_size), "--gpu", options.gpu])


def _plan_line(run: RunFile, machines: str) -> str:
    with garbage.paused():
        from refiner_ds.plan.checking import plan_for

    try:
        return json.dumps(plan_for(run, json.loads(machines)))
    except RefinerError:
        raise
    except Exception as error:  # a plan is advice: a model that cannot be traced can still be trained
        return json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


def ready_to_start(run: RunFile, world_size: int) -> int:
    """Check a run, its data and its run folder as ``world_size`` processes would at their start; submit asks this."""
    with garbage.paused():
        from refiner_ds.training.preparation import prepare, refuse_missing_files

    ready = prepare(run, world_size)
    refuse_missing_files(run, ready.sets)
    if (finished := ready.finished()) is not None:
        raise ConfigError(finished)
    print(f"{run.path}: ready; {ready.train.describe()}", flush=True)  # whatever becomes of a plan after it
    return 0


def train(run: RunFile, arguments: list[str]) -> int:
    """Train one run on the processes that the environment describes, resuming what its run folder holds."""
    with garbage.paused():
        from refiner_ds.training import relaunch
        from refiner_ds.training.environment import world_size_of
        from refiner_ds.training.preparation import prepare

    world_size = world_size_of(os.environ)
    relaunching = relaunch.is_lone_cpu_child_of_deepspeed()
    ready = prepare(run, relaunch.CPU_PROCESSES if relaunching else world_size)
    if (finished := ready.finished()) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(finished)
        return 0
    if relaunching:
        return relaunch.run_processes(Path(__file__).resolve(), arguments)

    with garbage.paused():
        from refiner_ds.training import session

    return session.run_training(ready)


if __name__ == "__main__":
    sys.exit(main())
