"""What each file of tests takes: seconds, and CPU seconds of its process and of all that this started.

Several tests at a time share the cores: CPU seconds decide how long all of them take, and what only waits costs little.
Hooks of pytest, which finds them in conftest.py.
"""

from __future__ import annotations

import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

SHOWN = 15
PROPERTY = "costs"
TICKS = os.sysconf("SC_CLK_TCK")

Identity = tuple[int, int]  # process id, and when it started: ids come again
ME: Identity = (0, 0)


@dataclass(frozen=True)
class Process:
    """A process as /proc has it: its parent's id, its own CPU seconds, and those of its children that it waited for."""

    parent: int
    own: float
    waited: float


def processes() -> dict[Identity, Process]:
    """Every process, those included that have ended and that nobody has waited for."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            user, system, waited_user, waited_system = (int(field) / TICKS for field in fields[11:15])
            identity = int(stat.parent.name), int(fields[19])
            found[identity] = Process(int(fields[1]), user + system, waited_user + waited_system)
    return found


class Meter:
    """CPU seconds of this process and of all that it started, directly or not; they never become fewer.

    The kernel hands the seconds of a process that ends to its parent, and only if this waits for it. Those of one whose
    parent ended before, or that ended with its namespace as what runs on a node of a Slurm does, are handed to nobody:
    they count here as they were last seen. What has lost its parent is followed.
    """

    def __init__(self, processes: Callable[[], dict[Identity, Process]] = processes) -> None:
        self._processes = processes
        self._lost = self._waited = 0.0
        self._seen: dict[Identity, Process] = {}
        self._heirs: dict[Identity, Identity | None] = {}  # who is handed the seconds of each

    def read(self) -> float:
        """CPU seconds until now."""
        own, waited = (seconds(resource.getrusage(who)) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        now = self._processes()
        self._lost += self._handed_to_nobody(now, waited - self._waited)
        self._waited = waited
        self._heirs = self._started(now)
        self._seen = {process: now[process] for process in self._heirs}
        return own + waited + self._lost + sum(one.own + one.waited for one in self._seen.values())

    def _handed_to_nobody(self, now: dict[Identity, Process], gained: float) -> float:
        """Seconds of what has ended since the last reading, less what those gained who should have waited for it."""
        ended: defaultdict[Identity | None, float] = defaultdict(float)  # by the nearest ancestor that is left
        for process, one in self._seen.items():
            if process not in now:
                heir = self._heirs[process]
                while heir not in (ME, None) and heir not in now:
                    heir = self._heirs[heir]
                ended[heir] += one.own + one.waited
        gains = {ME: gained, None: 0.0}
        gains |= {heir: now[heir].waited - self._seen[heir].waited for heir in ended if heir not in (ME, None)}
        return sum(max(0.0, seconds - gains[heir]) for heir, seconds in ended.items())

    def _started(self, now: dict[Identity, Process]) -> dict[Identity, Identity | None]:
        """All that this process has started and that is left: who is handed the seconds of each."""
        children: defaultdict[int, list[Identity]] = defaultdict(list)
        for process, one in now.items():
            children[one.parent].append(process)
        heirs: dict[Identity, Identity | None] = {}
        orphans = [(process, None) for process in self._seen if process in now]  # those that no child leads to
        for root, heir in [*((child, ME) for child in children[os.getpid()]), *orphans]:
            left = [] if root in heirs else [root]
            heirs.setdefault(root, heir)
            while left:
                parent = left.pop()
                found = [child for child in children[parent[0]] if child not in heirs]
                heirs |= dict.fromkeys(found, parent)
                left += found
        return heirs


def seconds(used: resource.struct_rusage) -> float:
    """CPU seconds of what the kernel says was used."""
    return used.ru_utime + used.ru_stime


_meter = Meter()
_elsewhere = 0.0
_begun: tuple[Path, float, float] | None = None  # the file whose tests run, and when it began


def count(seconds: float) -> None:
    """Count CPU seconds that another process used on behalf of the test that runs."""
    global _elsewhere
    _elsewhere += seconds


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when the first test of a file begins."""
    global _begun
    if _begun is None or _begun[0] != item.path:
        _begun = item.path, time.monotonic(), _meter.read() + _elsewhere


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """Let the report of a file's last test say what the file took, its fixtures' ends included."""
    last = nextitem is None or nextitem.path != item.path
    if last:
        _meter.read()  # what fixtures are about to end is seen once more
    try:
        return (yield)
    finally:
        if _begun is not None and last:
            _, began, cpu = _begun
            costs = [time.monotonic() - began, _meter.read() + _elsewhere - cpu]
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
        wall, cpu = (sum(costs[number] for costs in files.values()) for number in (0, 1))
        terminalreporter.section(f"files that took most CPU; all: {cpu:.0f} CPU s, {wall:.0f} s one by one")
        for file, costs in sorted(files.items(), key=lambda item: -item[1][1])[:SHOWN]:
            terminalreporter.write_line(f"{costs[1]:7.1f} CPU s {costs[0]:7.1f} s  {file}")
