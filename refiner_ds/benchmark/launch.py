"""Seconds from ``launch/submit.py`` to the first step, part by part; the second time nothing has changed in between.

    python -m refiner_ds.benchmark launch                         a small run on this machine's CPU
    python -m refiner_ds.benchmark launch -- --nodes 4 --cluster mycluster.yaml --gpus-per-node 0

What follows ``--`` is submit.py's; with ``--wait`` on Slurm, else here. The queue's share is "until tasks start".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import refiner_ds
from refiner_ds.command_line import Parser
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

SMALL = (
    *("refiner.model.depth=2", "refiner.recipe.epochs=0.5", "refiner.recipe.warmup_epochs=0.1"),
    *("refiner.recipe.cooldown_epochs=0", "refiner.run.log_steps=1", "refiner.run.picture_epochs=5"),
)
PACKAGE = Path(refiner_ds.__file__).parent
SUBMITTED = re.compile(r"submitted\s+in [\d.]+ s \((.+)\)")


def main(argv: list[str]) -> int:
    """Submit twice and print both times, a row a part. Raises LaunchError where a submission fails."""
    parser = Parser(prog="python -m refiner_ds.benchmark launch", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="flags of submit.py, after --")
    words = parser.parse_args(argv).words or ["--local", "--gpus-per-node", "0"]
    with tempfile.TemporaryDirectory(prefix="launch-", dir=Path.cwd()) as folder:
        first, again = (measure(Path(folder), f"run{number}", words) for number in range(2))
    width = max(map(len, first))
    print(f"{'seconds':<{width}}  first  again")
    for part in first:
        print(f"{part:<{width}}  {first[part]:5.1f}  {again.get(part, 0.0):5.1f}")
    print(f"{'in all':<{width}}  {sum(first.values()):5.1f}  {sum(again.values()):5.1f}")
    return 0


def measure(folder: Path, name: str, words: list[str]) -> dict[str, float]:
    """Seconds of every part of one launch."""
    script = next(path for path in (PACKAGE.parent / "launch/submit.py", PACKAGE / "launch/submit.py") if path.exists())
    keys = (*SMALL, f"refiner.run.output={folder}", f"refiner.run.name={name}")
    sets = [word for key in keys for word in ("--set", key)]
    waits = [] if "--local" in words else ["--wait"]
    began = time.time()
    done = subprocess.run((sys.executable, str(script), *sets, *words, *waits), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise LaunchError(f"submit.py left with exit code {done.returncode}: {last}")
    said = SUBMITTED.search(done.stdout)
    assert said is not None, done.stdout
    laps = dict(part.rsplit(" ", 1) for part in said[1].split(", "))
    parts = {f"submit.py: {lap}": float(seconds) for lap, seconds in laps.items()}
    return parts | _after(RunFolder(folder / name), began + sum(parts.values()))


def _after(run: RunFolder, submitted: float) -> dict[str, float]:
    """What follows the submission, from the moments that its run folder holds."""
    (attempts,) = run.jobs.glob("*_attempts.json")
    started = json.loads(attempts.read_text())[0]["started"]
    line = run.rank_log(0).read_text().splitlines()[0]  # "2026-11-25 17:00:00,123 INFO …": all libraries are loaded
    joined = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    first = json.loads(run.metrics.read_text().splitlines()[0])
    moments = {"until tasks start": started, "imports, process group": joined, "first step": first["time"]}
    parts, before = {}, submitted
    for part, moment in moments.items():
        parts[part], before = max(0.0, moment - before), moment
    return parts
