"""Submit a table of runs: one for every combination of some run-file keys, or for every row of a table.

    python launch/sweep.py table.json --nodes 1 --cluster mycluster.yaml          what is missing or failed
    python launch/sweep.py table.json --at-most 4 --nodes 1 …                     four jobs at once
    python launch/sweep.py --config ds_configs/refiner_s.json --grid refiner.recipe.lr=5e-4,1e-3 --nodes 1 …
    python launch/sweep.py table.json --local                                     here, one after the other
    python launch/sweep.py table.json --collect                                   one table of what there is

A table is a JSON file:

    {"config": "refiner_s.json",                                     run file of every row, beside the table
     "grid": {"refiner.model.expansion_ratio": [1, 2, 3],            every combination …
              "refiner.run.seed": [0, 1, 2]},
     "rows": [{"label": "plain", "set": {"refiner.model.refiner": "none"}}, …]}      … of every row

A run's name is its label and a signature of what differs, in the folder <output>/<name of the table>. The same command
again submits only what is missing or has failed: finished runs and jobs that wait or run are left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "launch"

from refiner_ds.command_line import Parser
from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.run_folder import RunFolder
from refiner_ds.sweep_table import SweepRun, read_table, table_from_flags

from . import slurm, submission, submit
from .cluster import load_profile
from .sweep_results import collect


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit code: 0; 2 where it refuses; with ``--local`` the first failed run's."""
    args = _parser().parse_args(argv)
    if (args.table is None) == (args.config is None):
        raise LaunchError("give a table, or --config with --grid")
    table = read_table(args.table).across(args.grid) if args.table else table_from_flags(Path(args.config), args.grid)
    runs = table.runs(args.set)
    if args.collect:
        print(collect(runs, args.csv))
        return 0
    return _run_here(runs, args) if args.local else _submit(runs, args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, metavar="TABLE", help="JSON file; see above")
    parser.add_argument("--config", metavar="FILE", help="run file of every run, instead of a table")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="values of a key; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same for every run")
    parser.add_argument("--at-most", type=int, metavar="N", help="jobs at once (all)")
    parser.add_argument("--local", action="store_true", help="run here, one after the other")
    parser.add_argument("--dry-run", action="store_true", help="say what would be submitted")
    parser.add_argument("--collect", action="store_true", help="print what the runs have reached")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --collect: write the table here too")
    submit.add_machine_flags(parser)
    submit.add_plan_flag(parser)
    return parser


def _submit(runs: list[SweepRun], args: argparse.Namespace) -> int:
    if args.at_most is not None and args.at_most < 1:
        raise LaunchError(f"--at-most {args.at_most}: let at least one job run")
    profile = load_profile(args.cluster, {key: getattr(args, key) for key in submit.profile_flags()})
    slurm.require_slurm()
    active, allocations = list[str](), []
    for run in runs:
        jobs = slurm.unfinished_jobs(RunFolder(run.folder).jobs)
        if jobs:
            active += jobs
            print(f"{run.name}: {', '.join(f'job {number} ({state})' for number, state in jobs.items())}")
        elif run.finished:
            print(f"{run.name}: finished")
        else:
            args.config, args.set = str(run.config), run.overrides
            allocations.append((run, submit.make_allocation(args, profile)))
    # All are checked before any is submitted: half a table in the queue is worse than none.
    for run, allocation in allocations:
        submit.check(allocation, run.overrides, args.ignore_plan)
    if args.dry_run:
        for run, _ in allocations:
            print(f"{run.name}: would be submitted")
        return 0
    lanes = [*active]  # the last job of each; a new one waits for the one that is as many places before it
    for run, allocation in allocations:
        full = args.at_most is not None and len(lanes) >= args.at_most
        before = lanes[-args.at_most] if full else None
        job_id = submission.submit(allocation, dependency=f"afterany:{before}" if before else "").job_id
        lanes.append(job_id)
        print(f"{run.name}: job {job_id}{f', after job {before}' if before else ''}", flush=True)
    if not allocations:
        print("nothing to submit: every run has finished, or has a job")
    return 0


def _run_here(runs: list[SweepRun], args: argparse.Namespace) -> int:
    machine = [word for key in submit.profile_flags() if (value := getattr(args, key)) is not None
               for word in (f"--{key.replace('_', '-')}", str(value))]  # fmt: skip
    machine += ["--nodes", str(args.nodes), *(["--cluster", str(args.cluster)] if args.cluster else [])]
    for number, run in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {run.name}{', finished' if run.finished else ''}", flush=True)
        if run.finished:
            continue
        sets = [word for override in run.overrides for word in ("--set", override)]
        dry = [flag for flag, given in (("--dry-run", args.dry_run), ("--ignore-plan", args.ignore_plan)) if given]
        if code := submit.main(["--config", str(run.config), *sets, "--local", *machine, *dry]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
