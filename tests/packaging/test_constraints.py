"""The lock file decides every package that pyproject.toml asks for, within its ranges."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [*PROJECT["dependencies"], *(wanted for extra in PROJECT["optional-dependencies"].values() for wanted in extra)]


def locked() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [line.split("==") for line in lines]
    assert all(len(pin) == 2 and " " not in "".join(pin) for pin in pins), "a line is not name==version"
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.mark.parametrize("wanted", ASKED)
def test_each_requirement_is_locked_within_its_range(wanted: str) -> None:
    requirement = Requirement(wanted)
    if requirement.name == "refiner_ds":
        assert requirement.extras <= PROJECT["optional-dependencies"].keys()
        return
    version = locked().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is not in constraints.txt: make test-newest lock"
    assert version in requirement.specifier


def test_the_lock_holds_no_duplicates() -> None:
    names = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert len({canonicalize_name(name) for name in names}) == len(names)
