"""The drill's table, for a terminal and for a page."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path
from statistics import median

from tests.drill.course import Recovery
from tests.drill.drill import Drill
from tests.drill.events import CHANGE

BEGIN, END = "<!-- drill -->\n", "<!-- end of drill -->"
WIDTH = 128
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
    cores = len(os.sched_getaffinity(0))
    day = f"{time.localtime().tm_mday} {time.strftime('%B %Y')}"
    where = f"{CORES.get(cores, f'{cores} CPU cores')} shared with other work, {day}"
    told = f"{len(drill.recoveries)} events in {drill.seconds / 60:.0f} minutes, {drill.starts} starts"
    told += f" (`{words}`; {where}). {how_it_ended(drill)}"
    paragraph = textwrap.fill(told, WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{paragraph}\n\n{table(drill.recoveries)}\n"


def how_it_ended(drill: Drill) -> str:
    """What became of the disturbed runs, beside the undisturbed one."""
    if wrong := drill.differences():
        return f"Differs: {', '.join(wrong)}."
    same, changing = drill.steps
    told = f"The run on two processes ended as the undisturbed one, bit for bit, after {same:,} steps."
    if drill.changes:
        times = sum(one.kind.startswith(CHANGE) for one in drill.recoveries)
        often = "once" if times == 1 else f"{times} times"
        told += (
            f" In the one whose number of processes changed {often} every step was made of the same samples, and"
            f" its loss, over {changing:,} steps, stayed within {100 * drill.loss_apart():.1f} %."
        )
    return told


def write(page: Path, text: str) -> None:
    """Put the report into a page, between its two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}{text}{END}{after}")
