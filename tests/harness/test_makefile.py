"""What make would do, for every target and variable that it has: a dry run says so, and installs nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Makefile").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
TARGETS = re.search(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE)[1].split()  # type: ignore[index]
VARIABLES = re.findall(r"^(\w+) \?=", TEXT, re.MULTILINE)
TESTING = ("test", "test-long", "test-fast", "test-isa", "test-newest")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def environment() -> dict[str, str]:
    """What a make started here is given: MAKEFLAGS of one that runs the tests would say JOBS and others, too."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in VARIABLES}


def planned(*words: str) -> list[str]:
    """The commands that make would run, continued lines joined; all is installed anew."""
    done = subprocess.run(
        ("make", "--dry-run", "--always-make", *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if not line.startswith("make")]


def last(*words: str) -> list[str]:
    """The words of the last command."""
    return shlex.split(planned(*words)[-1])


def installs(*words: str) -> list[str]:
    """The commands that install something."""
    return [line for line in planned(*words) if " pip install " in line]


PYTEST = [".venv/bin/python", "-m", "pytest", "-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]


def test_the_head_tells_of_every_target() -> None:
    told = re.findall(r"^# make ([\w-]+) ", TEXT, re.MULTILINE)
    assert sorted(told) == sorted(set(TARGETS) - {"clean"})
    assert set(TARGETS) <= set(re.findall(r"^([\w-]+):", TEXT, re.MULTILINE))


def test_tests_are_all_but_the_long_ones_several_at_a_time() -> None:
    assert last("test") == [*PYTEST, "-m", "not long"]
    assert last("test-long") == [*PYTEST, "-m", "long"]
    assert last("test-fast") == [*PYTEST, "-m", "not slow and not slurm and not long"]


def test_pages_say_how_many_tests_run_at_a_time() -> None:
    words = "one two three four five six seven eight".split()
    jobs = words[int(PYTEST[PYTEST.index("-n") + 1]) - 1]
    for file in [*PAGES, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        found = re.findall(rf"\b({'|'.join(words)})(?: tests)? at a time", file.read_text())
        assert set(found) <= {jobs}, file.name


def test_the_operators_tests_are_repeated_as_on_a_smaller_cpu() -> None:
    command = last("test-isa")
    split = command.index(PYTEST[0])
    cpu = dict(word.split("=", 1) for word in command[:split])
    assert (cpu["ONEDNN_MAX_CPU_ISA"], cpu["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")
    assert Path(cpu["TORCHINDUCTOR_CACHE_DIR"]).is_absolute()
    assert command[split:][: len(PYTEST)] == PYTEST
    files = [word for word in command[split + len(PYTEST) :] if not word.startswith("-")]
    assert "tests/attention" in files and all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("target", TESTING)
def test_jobs_decides_how_many_tests_run_at_a_time(target: str) -> None:
    command = last(target, "JOBS=3")
    assert command[command.index("-n") + 1] == "3"


@pytest.mark.parametrize("target", ["test", "test-long", "test-fast", "test-newest"])
def test_tests_decides_which_run(target: str) -> None:
    assert last(target, "TESTS=tests/training tests/data")[-2:] == ["tests/training", "tests/data"]


@pytest.mark.parametrize("target", sorted({*TARGETS} - {"test-newest", "lock", "clean"}))
def test_venv_decides_where_everything_is_installed_and_runs(target: str) -> None:
    commands = planned(target, "VENV=/elsewhere/env")
    assert commands[0] == "python3 -m venv /elsewhere/env"
    assert all("/elsewhere/env" in command for command in commands) and not any(".venv" in line for line in commands)


def test_python_decides_what_the_environment_is_made_with() -> None:
    assert planned("test", "PYTHON=python3.12")[0] == "python3.12 -m venv .venv"
    assert not any("python3.12" in command for command in planned("test", "PYTHON=python3.12")[1:])


@pytest.mark.parametrize("target", sorted({*TARGETS} - {"test-newest", "lock", "clean"}))
def test_locked_versions_are_installed_unless_told_otherwise(target: str) -> None:
    usual, newest = installs(target), installs(target, "LOCKED=--upgrade")
    assert usual and all("-c constraints.txt" in line and "--upgrade" not in line for line in usual)
    assert newest == [line.replace("-c constraints.txt", "--upgrade") for line in usual]
    assert (ROOT / "constraints.txt").is_file()


def test_what_tests_need_is_installed_besides_what_training_needs() -> None:
    assert [shlex.split(line)[-1] for line in installs("quickstart")] == [".[train]"]
    assert [shlex.split(line)[-1] for line in installs("test")] == [".[train]", ".[test]"]


def test_nothing_is_installed_again_until_something_else_is_to_be(tmp_path: Path) -> None:
    place, clone = tmp_path / "env", tmp_path / "clone"
    place.mkdir()
    clone.mkdir()
    sources = ("Makefile", "pyproject.toml", "setup.py", "constraints.txt")
    for name in sources:
        shutil.copy(ROOT / name, clone)
        os.utime(clone / name, (1e9, 1e9))

    def would_install() -> bool:
        command = ("make", "--dry-run", "test", f"VENV={place}")
        return "pip install" in subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout

    assert would_install()
    for name, moment in (("installed", 1.1e9), ("installed-test", 1.2e9)):
        (place / name).touch()
        os.utime(place / name, (moment, moment))
    assert not would_install()
    for name in sources[1:]:
        os.utime(clone / name, (1.3e9, 1.3e9))
        assert would_install(), name
        os.utime(clone / name, (1e9, 1e9))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what make reads and writes, and a Python that makes environments and fails where it is told to."""
    (tmp_path / "docs").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> told
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && for name in python deepspeed pre-commit; do cp "$0" "$3/bin/$name"; done ;;
    *--exclude-editable*) printf 'pip==1.0\ntorch==2.0\n' ;;
    *refiner_ds.config) printf 'A page.\\n\\nIts \\\\n end.\\n' ;;
    *freeze*) printf 'pip==1.0\n-e refiner_ds\ntorch==2.0\n' ;;
esac
if [ -n "$FAILS" ]; then case "$*" in *"$FAILS"*) exit 3 ;; esac fi
exit 0
"""


def make(clone: Path, *words: str, fails: str = "") -> list[str]:
    """What Python is told in a real run, which has to fail where this does."""
    (clone / "told").unlink(missing_ok=True)
    command = ("make", "PYTHON=./python", *words)
    done = subprocess.run(
        command, cwd=clone, env={**environment(), "FAILS": fails}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode != 0) == bool(fails), done.stderr
    return (clone / "told").read_text().splitlines()


def test_what_is_installed_stays_installed_and_what_failed_is_tried_again(clone: Path) -> None:
    assert make(clone, "test", fails=".[train]")[-1].endswith(".[train]")
    assert make(clone, "test", fails=".[test]")[-1].endswith(".[test]")
    told = make(clone, "test")
    assert told[0].endswith(".[test]") and "pytest" in told[1] and len(told) == 2
    (told_again,) = make(clone, "test")
    assert "pytest" in told_again


@pytest.mark.parametrize("target", sorted({*TARGETS} - {"lock", "clean"}))
def test_a_target_fails_where_its_command_does(target: str, clone: Path) -> None:
    command = make(clone, target)[-1]
    assert make(clone, target, fails=command.split(" -")[-1])[-1] == command


def test_the_locked_versions_are_all_but_pip_and_the_project(clone: Path) -> None:
    (clone / ".venv-newest/bin").mkdir(parents=True)
    shutil.copy(clone / "python", clone / ".venv-newest/bin/python")
    before = (clone / "constraints.txt").read_text()
    make(clone, "lock", fails="freeze")
    assert (clone / "constraints.txt").read_text() == before
    make(clone, "lock")
    head, *versions = (clone / "constraints.txt").read_text().splitlines()
    assert head.startswith("# ") and versions == ["torch==2.0"]


def test_a_page_is_written_whole_or_not_at_all(clone: Path) -> None:
    make(clone, "docs", fails="refiner_ds.config")
    assert not (clone / "docs/run_file.md").exists()
    make(clone, "docs")
    assert (clone / "docs/run_file.md").read_text() == "A page.\n\nIts \\n end.\n"


def test_the_newest_versions_have_an_environment_of_their_own_and_become_the_locked_ones() -> None:
    commands = planned("test-newest")
    assert commands[0] == "python3 -m venv .venv-newest" and not any(".venv/" in command for command in commands)
    assert all("--upgrade" in line and "constraints.txt" not in line for line in installs("test-newest"))
    assert commands[-1].startswith(".venv-newest/bin/python -m pytest")
    (lock,) = planned("lock")
    assert ".venv-newest/bin/python -m pip freeze" in lock


def test_linters_are_those_of_pre_commit_on_the_whole_tree() -> None:
    *path, command, run, everything = last("lint")
    assert (command, run, everything) == (".venv/bin/pre-commit", "run", "--all-files")
    assert path[0].startswith(f"PATH={ROOT}/.venv/bin:")  # whose programs the hooks are


def test_the_other_targets_run_what_they_say() -> None:
    python = ".venv/bin/python"
    assert last("quickstart") == [".venv/bin/deepspeed", "refiner_ds/train.py"]
    assert " ".join(last("docs")).startswith(f"page=$({python} -m refiner_ds.config)")
    assert last("drill")[:3] == [python, "-m", "tests.drill"]
    assert last("drill")[-2:] == ["--report", "docs/reliability.md"]
    assert last("drill-slurm") == [python, "-m", "tests.launch.drills"]
    assert last("gpu") == [python, "-m", "refiner_ds.benchmark", "gpu"]
    assert last("gpu", "GPU=--long") == [*last("gpu"), "--long"]
    assert last("compiled")[:4] == [python, "-m", "refiner_ds.benchmark", "compiled"]
    assert last("clean") == ["rm", "-rf", ".venv", ".venv-newest", "build", "*.egg-info"]


def test_every_variable_is_tested_here_and_a_page_names_no_other() -> None:
    tested = {"PYTHON", "VENV", "JOBS", "TESTS", "LOCKED", "GPU"}
    assert set(VARIABLES) | set(re.findall(r"\$\((TESTS|GPU)\)", TEXT)) == tested
    for page in [*PAGES, ROOT / "Makefile"]:
        for words in re.findall(r"\bmake [a-z-]+((?: [A-Z_]+=\S*)+)", page.read_text()):
            assert set(re.findall(r"([A-Z_]+)=", words)) <= tested, f"{page.name}: make …{words}"
