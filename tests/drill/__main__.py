"""``make drill``: runs that everything happens to, beside one that nothing does.

    python -m tests.drill --events 100 --minutes 60 --report docs/reliability.md

Small models train under `refiner_ds.restart`; nobody touches them but the events. One, always on two processes, must
end with the weights, moments, EMA and numbers of the undisturbed run, bit for bit; another, whose number of processes
changes, with the same samples in every step.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from tests.data.small_disk import SmallDisk, run_on_small_disk
from tests.drill.drill import Drill, Plan
from tests.drill.events import EVENTS
from tests.drill.report import report, write


def main() -> int:
    """Run the drill; returns 0 where the runs came through."""
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=100, metavar="N", help="events in all (default: 100)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="end after so long (default: 60)")
    parser.add_argument("--changing", type=int, default=16, metavar="N", help="of these, while the world changes")
    parser.add_argument("--real", type=int, default=2, metavar="N", help="of these, under torchrun and deepspeed each")
    parser.add_argument("--seed", type=int, default=0, help="of the order and moments of events")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where it is kept (default: it is not)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="page whose table is replaced")
    parser.add_argument(
        "--kind", action="append", choices=[*EVENTS], metavar="EVENT", help="events of this kind alone; repeatable"
    )
    options = parser.parse_args()
    same = options.events - options.changing - 2 * options.real
    kinds = tuple(options.kind or EVENTS)
    plan = Plan(same, options.changing, options.real, 60 * options.minutes, seed=options.seed, kinds=kinds)

    def drill(disk: SmallDisk | None) -> int:
        drill = Drill(folder / "runs", plan, disk)
        try:
            drill.run()
        finally:
            if options.folder:
                _keep(folder, options.folder)
        text = report(drill, shlex.join(["python", "-m", "tests.drill", *sys.argv[1:]]))
        print(text)
        if options.report:
            write(options.report, text)
        return 1 if drill.differences() else 0

    with tempfile.TemporaryDirectory(prefix="refiner_drill_") as place:
        folder = Path(place)
        return run_on_small_disk(folder, drill)


def _keep(folder: Path, into: Path) -> None:
    shutil.copytree(folder, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tensorboard", "heartbeats"))


if __name__ == "__main__":
    sys.exit(main())
