"""What a wheel installs, outside the clone it was built from, trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("refiner_ds", "launch", "data_tools", "ds_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
ONE_STEP = {
    "refiner.model.depth": 2,
    "refiner.recipe.epochs": 0.03,
    "refiner.recipe.warmup_epochs": 0,
    "refiner.recipe.cooldown_epochs": 0,
    "refiner.data.val": "null",
    "refiner.run.picture_epochs": "null",
}


class Installed:
    """A fresh environment that holds the package; what it depends on is lent by the environment of the tests."""

    def __init__(self, folder: Path, editable: bool = False) -> None:
        self.clone, self.venv, self.work = (folder / name for name in ("clone", "venv", "work"))
        self.clone.mkdir()
        self.work.mkdir()
        for name in SOURCES:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, self.clone / name)
        subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(self.venv)), check=True)
        (site,) = self.venv.glob("lib/python*/site-packages")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
        here = ("--no-deps", "--no-index", "--no-build-isolation")
        if editable:
            wanted = ["--editable", str(self.clone)]
        else:
            subprocess.run((*pip, "wheel", *here, "--wheel-dir", str(folder), str(self.clone)), check=True, cwd=folder)
            shutil.rmtree(self.clone)
            wanted = [str(wheel) for wheel in folder.glob("*.whl")]
        # pip looks for what builds a package where it installs it.
        lent = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (site / "lent.pth").write_text("\n".join(lent))
        into = ("--python", str(self.venv / "bin" / "python"), "install", "--ignore-installed", *here, *wanted)
        subprocess.run((*pip, *into), check=True, cwd=folder)
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment["REFINER_DS_CACHE"] = str(folder / "cache")

    def type(self, command: str, *words: str) -> str:
        """Run a command of the environment in a folder of its own; what it prints."""
        return self.run(command, *words).stdout

    def run(self, command: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The same, with environment variables; output and errors."""
        done = subprocess.run(
            (str(self.venv / "bin" / command), *words),
            cwd=self.work,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command} {words}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def settings(**more: Any) -> list[str]:
    return [word for key, value in {**ONE_STEP, **more}.items() for word in ("--set", f"{key}={value}")]


def test_a_wheel_installs_one_name_with_everything_in_it(installed: Installed) -> None:
    program = """
import importlib.util, json, refiner_ds
from pathlib import Path
found = {name: importlib.util.find_spec(name) is not None for name in ("launch", "data_tools", "ds_configs", "tests")}
package = Path(refiner_ds.__file__).parent
kinds = ("json", "yaml", "sbatch", "typed")
shipped = [str(file.relative_to(package)) for kind in kinds for file in package.rglob("*." + kind)]
print(json.dumps([found, str(package), shipped]))
"""
    found, package, shipped = json.loads(installed.type("python", "-c", program))
    assert not any(found.values()), found
    assert package.startswith(str(installed.venv))
    kinds = ("ds_configs/**/*.json", "launch/**/*.yaml", "launch/**/*.sbatch")
    clone = [file for kind in kinds for file in ROOT.glob(kind)]
    assert sorted(shipped) == sorted([*(str(file.relative_to(ROOT)) for file in clone), "py.typed"])


def test_an_installed_package_trains_and_evaluates(installed: Installed) -> None:
    installed.type("refiner-train", *settings())
    lines = (installed.work / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    said = installed.type("refiner-evaluate", "runs/quickstart", "--data", "package:digits/val", "--json")
    assert json.loads(said)["images"] == 364


def test_an_installed_launcher_runs_a_job_of_its_own_snapshot(installed: Installed) -> None:
    local = ("--local", "--gpus-per-node", "0", "--tasks-per-node", "1")
    installed.type("refiner-submit", *local, *settings(**{"refiner.run.name": "submitted"}))
    run = installed.work / "runs/submitted"
    assert len(list(run.glob("code/*/refiner_ds/launch/job.py"))) == 1
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]


def test_run_files_of_the_package_are_found_by_their_name(installed: Installed) -> None:
    mine = installed.work / "mine.json"
    mine.write_text('{"extends": "ds_configs/refiner_s.json", "refiner": {"run": {"name": "mine"}}}')
    for config in ("ds_configs/refiner_s.json", "mine.json"):
        said = installed.type("refiner-train", "--config", config, "--print-config")
        assert json.loads(said)["refiner"]["model"]["name"] == "refiner_vit_s"


def test_every_command_is_installed_and_helps_at_once(installed: Installed) -> None:
    """Torch alone takes seconds to import."""
    commands = [[name] for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]]
    for command in [*commands, ["python", "-m", "refiner_ds.gallery"], ["python", "-m", "refiner_ds.plan"]]:
        helped = installed.run(*command, "--help", PYTHONPROFILEIMPORTTIME="1")
        assert "usage" in helped.stdout
        assert "argparse" in helped.stderr and not re.search(r"\| +torch$", helped.stderr, re.MULTILINE), command
    assert "364" in installed.type("refiner-verify", "package:digits/val")


def test_a_clone_installed_in_place_has_the_same_commands(tmp_path: Path) -> None:
    clone = Installed(tmp_path, editable=True)
    program = "from refiner_ds.launch import submit; from refiner_ds.data_tools import shard; print(submit.__file__)"
    assert clone.type("python", "-c", program).strip() == str(clone.clone / "launch/submit.py")
    for command in ("refiner-submit", "refiner-shard", "refiner-train"):
        assert "usage" in clone.type(command, "--help")
