"""The models and the operator need no package of those that train them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from refiner_ds.installed import COMMANDS, TRAIN
from tests.training.launched import ROOT, environment

WITHOUT = """
import sys
from importlib.machinery import PathFinder


class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""

MODELS = """
import tempfile

import timm
import torch

import refiner_ds.models
from refiner_ds import attention
from refiner_ds.models import load_released_weights

small = {"img_size": 28, "patch_size": 4, "stem_chs": (8, 8, 8), "embed_dim": 16, "num_heads": 2, "depth": 2}
model = timm.create_model("refined_vit", **small)
images = torch.randn(2, 3, 28, 28)
model(images)[0].sum().backward()
logits = model.eval()(images)
file = tempfile.NamedTemporaryFile(suffix=".pth")
torch.save({"state_dict": model.state_dict()}, file.name)
load_released_weights(model, file.name)
assert torch.allclose(model.fuse()(images), logits, rtol=1e-3, atol=1e-4)
"""


def absent() -> set[str]:
    """Import names of the packages that only the extra "train" installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, extra = (
        {re.split(r"[^A-Za-z0-9_.-]", wanted)[0].lower() for wanted in requirements}
        for requirements in (project["dependencies"], project["optional-dependencies"]["train"])
    )
    through_timm = {"torchvision", "pyyaml", "pillow", "tqdm"}
    names = packages_distributions().items()
    return {name for name, owners in names if {owner.lower() for owner in owners} & (extra - core - through_timm)}


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-c", WITHOUT.format(absent=absent()) + program)
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)


def test_models_and_operator_work_without_what_trains_them(tmp_path: Path) -> None:
    assert {"deepspeed", "webdataset", "pydantic", "submitit", "sklearn", "matplotlib"} <= absent()
    done = run(MODELS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_training_lacks_is_named_with_how_to_install_it(tmp_path: Path) -> None:
    done = run("import refiner_ds.train", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("install refiner_ds[train], which trains and makes data"), done.stderr


def test_installed_commands_say_in_one_sentence_what_they_lack(tmp_path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"refiner-{name}": f"refiner_ds.installed:{name}" for name in COMMANDS}
    for module in COMMANDS.values():
        inside = module.removeprefix("refiner_ds.") if ".launch." in module or ".data_tools." in module else module
        assert (ROOT / f"{inside.replace('.', '/')}.py").exists()
    (tmp_path / "config.json").write_text("{}")
    for name, arguments in (("train", ["--help"]), ("evaluate", ["."])):
        call = f"import sys; sys.argv[1:] = {arguments}; from refiner_ds.installed import {name}; sys.exit({name}())"
        done = run(call, tmp_path)
        assert done.returncode == 2, done.stderr
        lacks = rf"refiner-{name}: \w+ is missing: install refiner_ds\[train\], which trains and makes data\n"
        assert re.fullmatch(lacks, done.stderr), done.stderr


def test_every_package_of_what_trains_is_known_to_the_commands() -> None:
    assert absent() - TRAIN == {"_xxhash", "mpl_toolkits", "pylab"}, "modules beside the packages' own"
