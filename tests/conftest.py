"""What every test can rely on: one torch thread, a package found without installation, and neighbours that do not meet.

Tests run side by side (``-n 2 --dist loadgroup``). Those of a file that share something made once for it, a run or a
cluster, stay together in one process; all others go wherever there is time.
"""

from __future__ import annotations

import os
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads on a busy two-core box slow torch down many times over

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when kernels are defined: before anything imports it

torch.set_num_threads(1)

STARTERS = ("torchrun", "run", "findings")  # of tests.training.launched


@pytest.fixture(autouse=True)
def same_randomness_each_test() -> None:
    """Start every test from the same torch generator, so that order does not matter."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes as slow, and keep together what shares."""
    for item in items:
        if starts_processes(item):
            item.add_marker("slow")
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))
        elif shares(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test's file starts processes of its own."""
    names = vars(getattr(item, "module", None) or object)
    launched = any(getattr(names.get(name), "__module__", "") == "tests.training.launched" for name in STARTERS)
    return launched or names.get("subprocess") is subprocess


def shares(item: pytest.Item) -> bool:
    """Whether a test uses something that is made once for all tests of a file or of a session."""
    definitions = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(
        made.scope in ("module", "session", "package") and made.func.__module__.startswith("tests.")
        for made in (overriding for *_, overriding in definitions)
    )
