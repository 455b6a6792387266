"""Report what the runs of tables have reached, beside the paper's values.

    python -m refiner_ds.report ds_configs/paper/expansion.json --grid refiner.run.seed=0,1,2
    python -m refiner_ds.report TABLE… --runs runs --out report.html
    python -m refiner_ds.report ds_configs/glue/tables/bert_small.json            of text: refiner_ds.text.sweep

Writes one HTML file that needs nothing else, and Markdown beside it. Both follow from the run folders alone: the same
folders give the same bytes. Rows that have not been run are shown as such. Exit codes: 0 written, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, report_errors
from refiner_ds.files import write_atomically
from refiner_ds.glue_table import is_glue_table, read_glue_table
from refiner_ds.report.contents import build_page
from refiner_ds.report.glue import glue_parts, states
from refiner_ds.report.runs import RunFacts, read_run
from refiner_ds.run_folder import RunFolder
from refiner_ds.sweep_table import Table, read_table


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    options = _parser().parse_args(argv)
    if options.out.suffix != ".html":
        raise ConfigError(f"--out {options.out}: name a file that ends in .html; Markdown goes beside it")
    if options.runs is not None and not options.runs.is_dir():
        raise ConfigError(f"--runs {options.runs}: is no folder; give the one that holds the tables' folders")
    overrides = [*options.set, *([f'refiner.run.output="{options.runs}"'] if options.runs else [])]
    glue = [read_glue_table(file) for file in options.tables if is_glue_table(file)]
    tables = [read_table(file).across(options.grid) for file in options.tables if not is_glue_table(file)]
    found: list[tuple[Table, list[RunFacts]]] = [
        (table, [read_run(run) for run in table.runs(overrides)]) for table in tables
    ]
    glue_output = (options.runs or Path("runs")) / "glue"
    page = build_page(found, [part for table in glue for part in glue_parts(table, glue_output)])
    RunFolder(options.out.parent).refuse_unwritable()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, page.html())
    write_atomically(options.out.with_suffix(".md"), page.markdown())
    runs = [run for _, facts in found for run in facts]
    counts = Counter(run.state for run in runs)
    for table in glue:
        counts.update(states(table, glue_output))
    said = ", ".join(f"{counts[state]} {state}" for state in ("finished", "begun", "missing") if counts[state])
    written = f"{options.out} and {options.out.with_suffix('.md').name}"
    print(f"{written}: {_count(len(options.tables), 'table')}, {_count(counts.total(), 'run')}: {said}")
    return 0


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "python -m refiner_ds.report")
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="table files, as launch/sweep.py takes")
    parser.add_argument("--runs", type=Path, metavar="ROOT", help="folder of run folders (the run files' own)")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="as it was given to sweep.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as it was given to sweep.py")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="HTML file (report.html)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
