"""Times as Slurm writes them."""

from __future__ import annotations

import re

SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def minutes_of(text: str) -> int | None:
    """Whole minutes, rounded up; None for "infinite" and what else is no time."""
    found = SLURM_TIME.fullmatch(text)
    if found is None:
        return None
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"]:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(found["days"])
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes[:seconds]
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return hours * 60 + minutes + (seconds + 59) // 60
