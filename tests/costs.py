"""What each file of tests takes: seconds, and CPU seconds of its process and of all that this started.

Four tests at a time share two cores: CPU seconds decide how long all of them take, and what only waits costs little.
Hooks of pytest, which finds them in conftest.py.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

SHOWN = 15
PROPERTY = "costs"
TICKS = os.sysconf("SC_CLK_TCK")

_begun: tuple[Path, float, float] | None = None  # the file whose tests run, and when it began


def cpu_seconds() -> float:
    """CPU seconds of this process, of its children that have ended, and of its living descendants with theirs."""
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            used[pid] = sum(map(int, fields[11:15])) / TICKS
    living, left = 0.0, children.get(os.getpid(), [])
    while left:
        living += sum(used[pid] for pid in left)
        left = [child for pid in left for child in children.get(pid, [])]
    return sum(one.ru_utime + one.ru_stime for one in ended) + living


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when the first test of a file begins."""
    global _begun
    if _begun is None or _begun[0] != item.path:
        _begun = item.path, time.monotonic(), cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """Let the report of a file's last test say what the file took, its fixtures' ends included."""
    try:
        return (yield)
    finally:
        if _begun is not None and (nextitem is None or nextitem.path != item.path):
            _, began, cpu = _begun
            costs = [time.monotonic() - began, cpu_seconds() - cpu]
            item.user_properties.append((PROPERTY, costs))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files that took most CPU."""
    files: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                costs = dict(report.user_properties).get(PROPERTY)
                if costs is not None:
                    files[report.nodeid.partition("::")[0]] = costs
    if files:
        seconds, cpu = (sum(costs[number] for costs in files.values()) for number in (0, 1))
        terminalreporter.section(f"files that took most CPU; all: {cpu:.0f} CPU s, {seconds:.0f} s one by one")
        for file, costs in sorted(files.items(), key=lambda item: -item[1][1])[:SHOWN]:
            terminalreporter.write_line(f"{costs[1]:7.1f} CPU s {costs[0]:7.1f} s  {file}")
