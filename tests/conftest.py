"""What every test can rely on: one torch thread, and a package that needs no installation to be found.

Tests run side by side, file by file (``-n 2 --dist loadfile``): those of a file share what it makes once, a run or a
cluster. Files that start processes come first, so that none of these long ones is left over at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads on a busy two-core box slow torch down many times over
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when kernels are defined: before anything imports it

torch.set_num_threads(1)

STARTERS = ("torchrun", "run", "ranks", "findings")  # of tests.training.launched


@pytest.fixture(autouse=True)
def same_randomness_each_test() -> None:
    """Start every test from the same torch generator, so that order does not matter."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes as slow, and in one of several test processes let it come first."""
    for item in items:
        if starts_processes(item):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test's file starts processes of its own."""
    names = vars(getattr(item, "module", None) or object)
    launched = any(getattr(names.get(name), "__module__", "") == "tests.training.launched" for name in STARTERS)
    return launched or names.get("subprocess") is subprocess
