"""What every test can rely on: one torch thread, and a package that needs no installation to be found.

Tests run side by side, file by file (``-n 4 --dist loadfile``): those of a file share what it makes once, a run or a
cluster. Files that start processes come first, the longest of all before them, so that none is left over at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads on a busy two-core box slow torch down many times over
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup: tests close the terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import torch

from refiner_ds import garbage
from tests.costs import pytest_runtest_setup, pytest_runtest_teardown, pytest_terminal_summary  # noqa: F401  (hooks)
from tests.training.launched import share_forkserver

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when kernels are defined: before anything imports it

torch.set_num_threads(1)

# Files of two minutes and more, longest first, as six at a time took them on two busy cores (30 November 2026); a file
# that is missing here only makes the end less even.
LONGEST = (
    "launch/test_slurm_jobs.py", "commands/test_quickstart.py", "plan/test_trace.py",
    "attention/triton/test_backend.py", "attention/test_operators.py", "commands/test_starting.py",
    "benchmark/test_model_benchmark.py", "training/test_launchers.py", "plan/test_plan.py",
    "data_tools/test_annotate.py", "launch/test_real_training.py", "attention/triton/test_linear.py",
    "drill/test_drill.py", "attention/triton/test_maps.py", "attention/triton/test_bottleneck_backward.py",
    "packaging/test_wheel.py", "launch/test_refusals.py", "models/test_inference.py",
    "evaluation/test_calibration.py", "launch/test_local_jobs.py", "launch/test_planned.py",
    "commands/test_export.py", "attention/triton/test_map_attend.py", "launch/test_chain.py",
    "launch/test_plain_sbatch.py", "models/test_models_page.py", "training/test_tensorboard.py",
    "training/test_score_maps.py", "training/test_resume.py", "launch/test_doctor.py",
    "benchmark/test_kernels_benchmark.py", "training/test_damaged_run_folder.py", "models/test_timm_models.py",
    "data/test_loader.py", "training/test_patience.py", "training/test_elastic.py",
)  # fmt: skip
# Kernels interpreted, operators checked, whole models traced: seconds a test.
COMPUTING = ("attention/triton/", "attention/test_operators.py", "attention/test_memory.py", "plan/")
STARTERS = ("run", "ranks", "running_ranks", "findings")  # of tests.training.launched


@pytest.fixture(autouse=True)
def same_randomness_each_test() -> None:
    """Start every test from the same torch generator, so that order does not matter."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of tests share what they fork ranks from."""
    if not hasattr(config, "workerinput"):  # the first of them
        share_forkserver()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Keep all that tests import out of garbage collections, and out of what forked processes copy."""
    with garbage.paused():
        found = yield
    garbage.freeze()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow and what has a Slurm; among several test processes, what starts processes comes first."""
    for item in items:
        if starts_processes(item) or name_of(item).startswith(COMPUTING):
            item.add_marker("slow")
        if "slurm_of_session" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=when)


def when(item: pytest.Item) -> tuple[bool, int]:
    """When a test comes, among several test processes: sorting by it keeps the tests of a file together."""
    name = name_of(item)
    place = LONGEST.index(name) if name in LONGEST else len(LONGEST)
    return not starts_processes(item) and place == len(LONGEST), place


def name_of(item: pytest.Item) -> str:
    """A test's file, from the folder of all tests."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test's file starts processes of its own."""
    names = vars(getattr(item, "module", None) or object)
    launched = any(getattr(names.get(name), "__module__", "") == "tests.training.launched" for name in STARTERS)
    return launched or names.get("subprocess") is subprocess
