"""What every test relies on is there: hooks that are called, tests that are marked, an order, a seed, one thread."""

from __future__ import annotations

import signal
import types
from pathlib import Path

import pytest
import torch

from tests import conftest, costs

TESTS = Path(conftest.__file__).parent


class Item:
    """A test as pytest would have collected it."""

    def __init__(self, file: str, **names: object) -> None:
        self.path, self.module = TESTS / file, types.SimpleNamespace(**names)
        self.marks, self.fixturenames = set[str](), list[str]()

    def add_marker(self, name: str) -> None:
        self.marks.add(name)


def module(source: str) -> dict[str, object]:
    """The names of a file of tests."""
    names: dict[str, object] = {}
    exec(source, names)
    return names


@pytest.mark.parametrize(
    ("file", "source", "slow"),
    [
        ("data/test_a.py", "import subprocess", True),
        ("data/test_a.py", "from tests.training.launched import ranks", True),
        ("data/test_a.py", "from tests.training.launched import running_ranks", True),
        ("data/test_a.py", "from tests.training.launched import run", True),
        ("data/test_a.py", "from tests.training.launched import findings", True),
        ("attention/triton/test_a.py", "", True),
        ("plan/test_a.py", "", True),
        ("data/test_a.py", "from tests.training.launched import ROOT, environment", False),
        ("data/test_a.py", "def run(): ...", False),
    ],
)
def test_what_starts_processes_or_computes_for_long_is_slow(file: str, source: str, slow: bool) -> None:
    item = Item(file, **module(source))
    conftest.pytest_collection_modifyitems([item])  # type: ignore[list-item]
    assert item.marks == ({"slow"} if slow else set())


def test_among_several_processes_the_longest_come_first_then_what_starts_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, starter = Item("data/test_a.py"), Item("data/test_b.py", **module("import subprocess"))
    second, first = (Item(conftest.LONGEST[place]) for place in (1, 0))
    again = Item("data/test_a.py")
    items = [plain, starter, second, first, again]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_collection_modifyitems(alone := [*items])  # type: ignore[arg-type, list-item]
    assert alone == items
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert items == [first, second, starter, plain, again]


def test_the_longest_files_are_named_once() -> None:
    assert len(set(conftest.LONGEST)) == len(conftest.LONGEST)


def test_pytest_calls_the_hooks(pytestconfig: pytest.Config) -> None:
    wanted = {
        "pytest_collection": conftest.pytest_collection,
        "pytest_collection_modifyitems": conftest.pytest_collection_modifyitems,
        "pytest_runtest_setup": costs.pytest_runtest_setup,
        "pytest_runtest_teardown": costs.pytest_runtest_teardown,
        "pytest_terminal_summary": costs.pytest_terminal_summary,
    }
    for name, function in wanted.items():
        assert function in [found.function for found in getattr(pytestconfig.hook, name).get_hookimpls()], name


def test_a_test_begins_with_the_same_seed_and_has_one_thread() -> None:
    assert torch.initial_seed() == 0
    assert torch.get_num_threads() == 1


def test_tests_can_press_ctrl_c_and_close_a_terminal() -> None:
    assert signal.SIG_IGN not in (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP))


def test_what_has_a_slurm_is_marked() -> None:
    items = [Item("launch/test_a.py"), Item("launch/test_a.py")]
    items[0].fixturenames = ["slurm_of_session", "tmp_path"]
    conftest.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.marks for item in items] == [{"slurm"}, set()]
