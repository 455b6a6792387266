"""``make drill``: a run that everything happens to, beside one that nothing does.

    python -m tests.drill --events 100 --minutes 60 --report docs/reliability.md

A small model trains on two processes under `refiner_ds.restart`; nobody touches it but the events. It must end with
the weights, the EMA and the numbers of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.drill.drill import Drill
from tests.drill.events import EVENTS


def main() -> int:
    """Run the drill; returns 0 where the run came through."""
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=100, metavar="N", help="events at least (default: 100)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="end after so long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and moments of events")
    parser.add_argument("--report", type=Path, metavar="FILE", help="page whose table is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="refiner_drill_") as folder:
        drill = Drill(Path(folder), options.seed)
        drill.run(list(EVENTS), options.events, options.minutes)
        print(drill.table())
        if options.report:
            drill.write(options.report)
        return 0 if drill.came_through() else 1


if __name__ == "__main__":
    sys.exit(main())
