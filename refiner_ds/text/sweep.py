"""Fine-tunes every row of a table on every task with every seed, one after the other; what has finished is left alone.

    python -m refiner_ds.text.sweep ds_configs/glue/tables/bert_small.json --data glue_data
    python -m refiner_ds.text.sweep TABLE --data glue_data --processes 8       each run on eight GPUs, by torchrun
    python -m refiner_ds.text.sweep TABLE --data glue_data --only 3            the fourth run alone: one job of an array
    python -m refiner_ds.report TABLE                                          collects it beside what is published

As a job array on Slurm (--dry-run prints how many runs there are):

    sbatch --array 0-53 --gpus 1 --wrap \\
        'python -m refiner_ds.text.sweep TABLE --data glue_data --only $SLURM_ARRAY_TASK_ID'

A table is a JSON file: rows with label and config, tasks, seeds (refiner_ds/glue_table.py). Exit codes: 0 all have
finished, 2 refused, otherwise the first failed run's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, report_errors
from refiner_ds.glue_table import GlueRun, GlueTable, read_glue_table


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _parser().parse_args(argv)
    table = read_glue_table(given.table)
    runs = table.runs(given.output)
    _check(table, given)
    if given.only is not None:
        if not 0 <= given.only < len(runs):
            raise ConfigError(f"--only {given.only}: {given.table} has the runs 0 to {len(runs) - 1}")
        runs = [runs[given.only]]
    for number, run in enumerate(runs, start=1):
        found = run.results()
        state = f"score {found['score']:.2f}" if found else "not run yet" if given.dry_run else "begins"
        print(f"run {number} of {len(runs)}: {run.name}, {state}", flush=True)
        if found is None and not given.dry_run and (code := subprocess.run(_command(run, given)).returncode):
            return code
    return 0


def _check(table: GlueTable, given: argparse.Namespace) -> None:
    """Refuse before the first run what would only be refused by a later one."""
    from refiner_ds.text.glue_data import read_task
    from refiner_ds.text.glue_tasks import task_of
    from refiner_ds.text.run_file import read_run

    if given.processes < 1:
        raise ConfigError(f"--processes {given.processes}: a run takes at least one")
    for config in table.rows.values():
        read_run(config)
    for task in table.tasks:
        read_task(given.data, task_of(task))


def _command(run: GlueRun, given: argparse.Namespace) -> list[str]:
    start = [sys.executable]
    if given.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(given.processes), "--module"]
    else:
        start += ["-m"]
    words = ["--task", run.task, "--config", run.config, "--data", given.data, "--seed", run.seed]
    return [*start, "refiner_ds.text.glue", *map(str, words), "--output", str(given.output)]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "python -m refiner_ds.text.sweep")
    parser.add_argument("table", type=Path, metavar="TABLE", help="JSON file, such as those in ds_configs/glue/tables")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="GLUE's files")
    parser.add_argument("--output", type=Path, default=Path("runs/glue"), metavar="FOLDER", help="default: runs/glue")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of a run (1)")
    parser.add_argument("--only", type=int, metavar="K", help="the K-th run of the table, from 0, alone")
    parser.add_argument("--dry-run", action="store_true", help="say what has finished and what has not")
    return parser


if __name__ == "__main__":
    sys.exit(main())
