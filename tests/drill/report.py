"""The drill's table, for a terminal and for a page."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

from tests.drill.course import Recovery
from tests.drill.drill import Drill

BEGIN, END = "<!-- drill -->\n", "<!-- end of drill -->"
CORES = {1: "one CPU core", 2: "two CPU cores", 4: "four CPU cores", 8: "eight CPU cores"}


def table(recoveries: list[Recovery]) -> str:
    """Markdown: by kind, how often, seconds to training again, steps taken again, and what a person had to do."""
    lines = [
        "| event | times | seconds to training again: median, worst | steps lost: median, worst | a person did |",
        "| --- | --- | --- | --- | --- |",
    ]
    kinds = sorted({recovery.kind for recovery in recoveries}, key=lambda kind: (not kind.startswith("SIG"), kind))
    rows = {kind: [recovery for recovery in recoveries if recovery.kind == kind] for kind in kinds}
    for kind, found in {**rows, "all": recoveries}.items():
        seconds, lost = [one.seconds for one in found], [one.steps_lost for one in found]
        lines.append(
            f"| {kind} | {len(found)} | {median(seconds):.1f}, {max(seconds):.1f} | {median(lost):.0f}, {max(lost)} |"
            " nothing |"
        )
    return "\n".join(lines)


def report(drill: Drill, words: str) -> str:
    """The table, and in words how the runs ended.

    Args:
        words: the command.
    """
    wrong = drill.differences()
    end = f"Differs: {', '.join(wrong)}." if wrong else "The runs came through: see above."
    cores = len(os.sched_getaffinity(0))
    day = f"{time.localtime().tm_mday} {time.strftime('%B %Y')}"
    where = f"{CORES.get(cores, f'{cores} CPU cores')} shared with other work, {day}"
    changes = drill.changes and not wrong
    apart = f" The loss where their number changed: within {100 * drill.loss_apart():.1f} %." if changes else ""
    return (
        f"{len(drill.recoveries)} events in {drill.seconds / 60:.0f} minutes, {drill.starts} starts"
        f" (`{words}`; {where}). {end}{apart}\n\n{table(drill.recoveries)}\n"
    )


def write(page: Path, text: str) -> None:
    """Put the report into a page, between its two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}{text}{END}{after}")
