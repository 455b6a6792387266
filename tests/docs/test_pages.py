"""What the pages say can be followed: links lead somewhere, and commands are ones that exist, with their options."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from refiner_ds.config.sections import key_paths
from refiner_ds.installed import COMMANDS
from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAUNCHERS = {  # options of a launcher that are followed by a value; the rest of its line is the program's
    "deepspeed": {"--master_port", "--num_accelerators", "--num_gpus", "--num_nodes", "--hostfile"},
    "torchrun": {
        "--nproc_per_node",
        "--nnodes",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--max_restarts",
        "--master_port",
    },
}


class Command(NamedTuple):
    """One command of a page: where it stands, the module it runs, and what it is given."""

    place: str
    module: str
    words: list[str]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Link targets inside the project: (path relative to the page, anchor)."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: no {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading #{anchor} in {path or page.name}"


def shell_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of indented and fenced blocks, and code spans, with continued lines joined and comments cut off."""
    text = page.read_text()
    fence, waiting = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip("` ") or "plain"
            continue
        if fence not in ("", "plain", "sh", "bash", "console"):
            continue
        block = line.startswith("    ") or fence
        for piece in [line] if block else re.findall(r"`([^`]+)`", line):
            piece = waiting + re.sub(r"\s#\s.*|\s{3,}\S.*", "", piece.strip().removeprefix("$ "))
            waiting = piece.removesuffix("\\") if piece.endswith("\\") else ""
            if not waiting:
                yield number, piece


def commands(page: Path) -> Iterator[Command]:
    """Commands of this project on a page."""
    scripts = PROJECT["scripts"]
    for number, line in shell_lines(page):
        with contextlib.suppress(ValueError):  # a quotation mark of prose
            first, *rest = shlex.split(line) or [""]
            place = f"{page.name}:{number}: {line}"
            if first in scripts:
                yield Command(place, COMMANDS[first.removeprefix("refiner-")], rest)
            elif first in ("python", "python3", *LAUNCHERS) and (found := _module_of(first, rest)):
                yield Command(place, *found)


def _module_of(launcher: str, words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a line runs and its words; None where it is another program's."""
    valued = LAUNCHERS.get(launcher, set())
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("-m", "--module"):
            position += 1
            module = words[position]
            break
        if word.endswith(".py"):
            if not (ROOT / word).is_file():
                assert "/" not in word or word.startswith("/"), f"there is no {word}"
                return None
            module = word.removesuffix(".py").replace("/", ".")
            break
        position += 2 if word in valued else 1
    else:
        return None
    ours = module.startswith(("refiner_ds", "launch", "data_tools"))
    return (module.removesuffix(".__main__"), words[position + 1 :]) if ours else None


@cache
def help_of(module: str, subcommand: str = "") -> str:
    """What ``--help`` of a command prints."""
    package = importlib.import_module(re.sub(r"^refiner_ds\.(launch|data_tools)\b", r"\1", module))
    if hasattr(package, "__path__"):
        package = importlib.import_module(f"{module}.__main__")
    if not hasattr(package, "main"):
        return ""  # takes nothing
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        package.main([*([subcommand] if subcommand else []), "--help"])
    return printed.getvalue()


ALL = [command for page in PAGES for command in commands(page)]


def test_the_pages_hold_commands() -> None:
    assert len(ALL) > 40, "blocks are no longer read"


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.place)
def test_commands_exist_and_take_these_options(command: Command) -> None:
    first = command.words[0] if command.words else ""
    if first and (named := re.match(r"usage: [^\[\n]*\{([\w,-]+)\}", help_of(command.module))):
        assert first in named[1].split(","), f"{command.place}: no {first}"
    subcommand = first if re.fullmatch("[a-z]+", first) else ""
    known = set(re.findall(r"--[a-z][\w-]*", help_of(command.module, subcommand)))
    for option in command.words:
        if option == "--":
            break  # what follows is another command
        if option.startswith("--"):
            assert option.partition("=")[0] in known, f"{command.place}: no option {option}"


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.place)
def test_keys_and_run_files_that_commands_name_exist(command: Command) -> None:
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option == "--set" and "=" in value:
            assert value.partition("=")[0] in set(key_paths()), command.place
        if value.startswith("ds_configs/"):
            assert (ROOT / value).is_file(), command.place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_prose_exist(page: Path) -> None:
    known = set(key_paths())
    sections = {path.partition(".")[0] for path in known if "." in path} - {"refiner"}
    keys = rf"`((?:refiner\.(?:model|data|recipe|run)|{'|'.join(sections)})(?:\.\w+)?)`"
    for key in re.findall(keys, page.read_text()):
        assert key in known, f"{page.name}: {key} is not a key"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(r"`((?:refiner_ds|launch|data_tools|tests|docs|ds_configs)/[\w/.-]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name}: there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_and_extras_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    for _, line in shell_lines(page):
        words = line.split()
        if words[:1] == ["make"]:
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= targets, f"{page.name}: {line}"
        if words[:2] == ["pip", "install"]:
            assert set(re.findall(r"\.\[([\w,]+)\]", line)) <= extras.keys(), f"{page.name}: {line}"


def test_files_and_modules_that_the_makefile_names_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    modules = re.findall(r"-m ((?:refiner_ds|tests)\.[\w.]+)", text)
    assert modules, "modules are no longer read"
    for path in re.findall(r"(?:refiner_ds|tests|docs)/[\w/.]+", text):
        assert (ROOT / path).exists(), path
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_files_that_come_first_exist() -> None:
    assert not [name for name in LONGEST if not (ROOT / "tests" / name).is_file()]
