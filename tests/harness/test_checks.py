"""CI and pre-commit fail where they should: a step that fails ends CI, and each hook refuses what it is there for."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
(LOCAL,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
HOOKS = {hook["id"]: hook for hook in LOCAL["hooks"]}
STEPS = ["lint", "test", "test-isa"]


@pytest.mark.parametrize("failing", [None, *STEPS])
def test_ci_makes_everything_anew_and_ends_at_the_first_step_that_fails(failing: str | None, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("slurmctld", "apt-get"):
        (programs / name).write_text("#!/bin/sh\n")
    (programs / "make").write_text(f'#!/bin/sh\necho "$@" >> steps\n[ ! -e .venv ] && [ "$1" != "{failing}" ]\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(("bash", ".ci/run"), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    run = STEPS[: STEPS.index(failing) + 1] if failing else STEPS
    assert (tmp_path / "steps").read_text().split() == run
    assert (done.returncode != 0) == (failing is not None), done.stderr


BAD = {
    "ruff-check": "import os\n",
    "ruff-format": "x = {  'a':1 }\n",
    "codespell": f"# this is {'het'[::-1]} end\n",
    "mypy": "x: int = 'a'\n",
}


def test_every_linter_has_a_hook_that_is_installed_with_the_tests() -> None:
    assert HOOKS.keys() == BAD.keys()
    for hook in HOOKS.values():
        assert hook["language"] == "system" and not hook.keys() & {"exclude", "files", "stages", "verbose"}, hook
        assert {"python"} <= {*hook.get("types_or", ()), *hook.get("types", ())} or hook["types"] == ["text"], hook
        assert hook["entry"].split()[0] in PROJECT["project"]["optional-dependencies"]["test"]


@pytest.mark.parametrize("name", BAD)
def test_a_hook_refuses_what_it_is_there_for_and_takes_the_rest(name: str, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for text, refused in ((BAD[name], True), ('"""A module."""\n', False)):
        file = tmp_path / "module.py"
        file.write_text(text)
        given = HOOKS[name].get("pass_filenames", True)
        if not given:
            (tmp_path / "pyproject.toml").write_text('[tool.mypy]\nfiles = ["module.py"]\n')
        words = (*shlex.split(HOOKS[name]["entry"]), *(["module.py"] if given else []))
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0) == refused, (text, done.stdout, done.stderr)
        assert file.read_text() == text  # a check changes nothing


def test_pages_are_checked_too(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
    (tmp_path / "page.md").write_text(f"A page about {'het'[::-1]} end.\n\n```python\nx = {{  'a':1 }}\n```\n")
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\npreview = true\n")
    names = {"GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"}  # of a commit that runs the tests in a hook
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PRE_COMMIT_HOME": str(tmp_path / "home")}

    def run(*words: str) -> str:
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120).stdout

    run("git", "init", "--quiet")
    run("git", "add", "page.md", "pyproject.toml", ".pre-commit-config.yaml")
    for hook in ("ruff-format", "codespell"):
        assert "Failed" in run("pre-commit", "run", hook, "--all-files"), hook


def test_ci_installs_the_slurm_that_the_page_names() -> None:
    wanted = "slurmctld slurmd slurm-client munge"
    for file in (".ci/run", "docs/developing.md"):
        assert f" {wanted}" in (ROOT / file).read_text(), file


def test_types_are_checked_strictly_in_all_that_is_ours() -> None:
    assert HOOKS["mypy"]["pass_filenames"] is False
    settings = PROJECT["tool"]["mypy"]
    assert settings["strict"] is True and {"refiner_ds", "launch", "data_tools", "tests"} <= {*settings["files"]}
