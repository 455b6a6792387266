"""One report of everything that waits for a GPU: tests, kernels, models, training, loader and annotator.

    python -m refiner_ds.benchmark gpu [--out gpu_report] [--long]     → gpu_report/report.md, pictures and logs beside

Parts run one after the other, each in a process of its own and within its share of the time: in the short form nine
minutes for all, in the long one an hour. A part that fails, or that there is no time for, is a row of the report that
says so, and the exit code is 1; without one it is 0. The report is written anew after each part, so that whatever stops
the command leaves what is known by then.

``--device cpu`` runs the same parts at tiny sizes, the kernels interpreted or compiled only, to try the report itself.
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from refiner_ds.benchmark.gpu_parts import Sizes, Step, stages_side_by_side, steps_of
from refiner_ds.benchmark.running import Outcome, run_step
from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError
from refiner_ds.files import write_atomically
from refiner_ds.page import Heading, Page, Part, Table, Text
from refiner_ds.training.machine import device_name, driver_version
from refiner_ds.versions import commit

__all__ = ["main", "machine", "report"]

SECONDS = {False: 530.0, True: 3500.0}  # for all parts, by whether the form is long
PACKAGES = ("torch", "triton", "deepspeed", "timm", "torchvision", "numpy")


def machine(device: torch.device) -> list[tuple[str, str]]:
    """What the report was made on and of, in pairs of a name and a value."""
    found = [("date", time.strftime("%d %B %Y, %H:%M UTC", time.gmtime())), ("commit", commit())]
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        first = torch.cuda.get_device_properties(0)
        found += [
            ("GPU", ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))),
            ("memory of one", f"{first.total_memory / 2**30:.0f} GiB"),
            ("compute capability", f"{first.major}.{first.minor}"),
            ("driver", driver_version(device) or "not told"),
            ("CUDA of torch", str(torch.version.cuda or torch.version.hip)),
        ]
    else:
        found.append(("GPU", "none: the parts are tiny, and figures mean nothing"))
    found += [
        ("CPU", f"{device_name(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores"),
        ("Python", platform.python_version()),
    ]
    return found + [(name, _version(name)) for name in PACKAGES]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report(about: list[tuple[str, str]], outcomes: list[Outcome], left: list[Step], seconds: float) -> Page:
    """The page, of what has been run and what has not been yet."""
    failed = [one for one in outcomes if one.state != "passed"]
    verdict = "All parts passed." if not failed and not left else f"{len(failed)} of {len(outcomes)} parts did not pass"
    if left:
        verdict += f"; not run yet: {', '.join(step.name for step in left)}"
    parts: list[Part] = [
        Text(f"{verdict.rstrip('.')}. {seconds:.0f} seconds in all."),
        Table(("machine", ""), about),
        Heading("Parts"),
        Table(
            ("part", "outcome", "seconds", "what it says"),
            [(one.step.name, one.state, f"{one.seconds:.0f}", one.why) for one in outcomes],
        ),
    ]
    for one in outcomes:
        parts += [Heading(one.step.name[0].upper() + one.step.name[1:]), Text(one.step.about)]
        parts += [Text(f"`{one.step.typed}`"), *one.parts]
        if one.state != "passed":
            parts.append(Text(f"**{one.state}: {one.why}**"))
    return Page("Refined attention on this machine", parts)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the report; see the head of this file.

    Raises:
        ConfigError: there is no GPU, an option cannot be, or the folder holds a report already.
    """
    parser = command_parser(__doc__, "python -m refiner_ds.benchmark gpu")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder to write (default %(default)s)")
    parser.add_argument("--long", action="store_true", help="larger models and compiled ones too; up to an hour")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, help="for all parts together, if not the form's own")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here; --device cpu tries the report itself, with parts that are tiny")
    if (given.out / "report.md").exists():
        raise ConfigError(f"--out {given.out}: holds a report already; name another folder")
    device = torch.device(given.device)
    cards = torch.cuda.device_count() if device.type == "cuda" else 2
    steps = steps_of(Sizes(device.type, cards, given.long), given.out.resolve())
    if given.only:
        if unknown := set(given.only) - {step.name for step in steps}:
            raise ConfigError(f"--only {unknown.pop()}: the parts are {', '.join(step.name for step in steps)}")
        steps = [step for step in steps if step.name in given.only]
    (given.out / "logs").mkdir(parents=True, exist_ok=True)
    return _run(steps, given.out, machine(device), given.seconds or SECONDS[given.long])


def _run(steps: list[Step], out: Path, about: list[tuple[str, str]], seconds: float) -> int:
    began, outcomes = time.monotonic(), list[Outcome]()

    def write(left: list[Step], more: list[Outcome]) -> None:
        page = report(about, [*outcomes, *more], left, time.monotonic() - began)
        write_atomically(out / "report.md", page.markdown())

    for number, step in enumerate(steps):
        print(f"{step.name} …", end=" ", flush=True)
        outcomes.append(run_step(step, out, seconds - (time.monotonic() - began)))
        print(f"{outcomes[-1].state}, {outcomes[-1].seconds:.0f} s {outcomes[-1].why}", flush=True)
        write(steps[number + 1 :], [])
    together = stages_side_by_side(out, outcomes)
    write([], together)
    print(f"{out / 'report.md'}")
    every: list[Any] = [*outcomes, *together]
    return 0 if all(one.state == "passed" for one in every) else 1
