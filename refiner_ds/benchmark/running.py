"""Runs one part of the report in a process group of its own, for so long and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from refiner_ds.page import Part

__all__ = ["Digest", "Outcome", "Step", "Unsound", "run_step"]

LEAST_SECONDS = 5.0  # with less time left a part is not begun


# From the folder of the report and what a command printed: a sentence for the table, and parts of the page.
Digest = Callable[[Path, str], tuple[str, list[Part]]]


class Unsound(Exception):
    """What a part found is not right; the message says what."""


@dataclass(frozen=True)
class Step:
    """A part of the report.

    Attributes:
        name: short, in lower case.
        about: what it shows, a sentence.
        command: to run, from the clone's root.
        seconds: that it may take.
        digest: what is shown of it; raises Unsound.
        environment: more variables; None takes one away.
        prepare: makes what the command needs, in the folder of the report.
    """

    name: str
    about: str
    command: list[str]
    seconds: float
    digest: Digest
    environment: dict[str, str | None] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None

    @property
    def typed(self) -> str:
        """The command as a person types it."""
        variables = [f"{name}={value}" for name, value in self.environment.items() if value is not None]
        return " ".join([*variables, "python", *self.command[1:]])


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "out of time" or "not run"."""

    step: Step
    state: str
    seconds: float
    why: str
    parts: list[Part] = field(default_factory=list)


def run_step(step: Step, out: Path, left: float) -> Outcome:
    """Run a part; whatever it does, this returns.

    Args:
        out: folder of the report; what the command prints goes to logs/ there.
        left: seconds that there are for it and all that follow.
    """
    if left < LEAST_SECONDS:
        return Outcome(step, "not run", 0.0, "no time is left")
    began = time.monotonic()
    log = out / "logs" / f"{step.name.replace(' ', '_')}.txt"
    try:
        if step.prepare is not None:
            step.prepare(out)
    except Exception as error:  # what is missing here is a row of the report
        return Outcome(step, "failed", time.monotonic() - began, str(error).split("\n")[0])
    code = _run(step, log, min(step.seconds, left))
    seconds = time.monotonic() - began
    printed = log.read_text(errors="replace")
    if code is None:
        return Outcome(step, "out of time", seconds, f"stopped after {seconds:.0f} s; see logs/{log.name}")
    try:
        why, parts = step.digest(out, printed)
    except Unsound as unsound:
        return Outcome(step, "failed", seconds, str(unsound))
    except Exception as error:  # whatever a command printed that cannot be read
        why, parts = f"what it printed cannot be read ({type(error).__name__}); see logs/{log.name}", []
        code = code or 1
    if code:
        told = why if parts or "cannot be read" not in why else _last_line(log.with_suffix(".err.txt"))
        return Outcome(step, "failed", seconds, f"exit code {code}: {told}", parts)
    return Outcome(step, "passed", seconds, why, parts)


def _run(step: Step, log: Path, seconds: float) -> int | None:
    """The exit code; None where time ran out. Nothing that it started lives on."""
    environment = {**os.environ, **{name: value for name, value in step.environment.items() if value is not None}}
    for name, value in step.environment.items():
        if value is None:
            environment.pop(name, None)
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH", "")]))
    # Terminated, this process ends the part as it does on Ctrl-C, rather than leave it behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with open(log, "w") as printed, open(log.with_suffix(".err.txt"), "w") as complained:
        process = subprocess.Popen(
            step.command, cwd=root, env=environment, stdout=printed, stderr=complained, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks outlive it
            except ProcessLookupError:
                pass
            process.wait()
            signal.signal(signal.SIGTERM, before)


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
