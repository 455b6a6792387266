"""Published sets in miniature: one command over all of them, on one process and on two, with timm's own count beside.

The model is a small one of timm's with weights of its own. Every image is filed under the class that the model, fed by
timm's transform, finds likeliest, or under another: how many are right is known before anything is evaluated.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config

from refiner_ds.data.writer import SetWriter
from refiner_ds.evaluation.sets import imagenet_synsets
from refiner_ds.exit_codes import REFUSED
from tests.training.launched import ROOT, environment, ranks

IMAGES = 13  # over two processes in batches of five: seven and six, and a padded tail on both
SYNSETS = imagenet_synsets()
SEVERAL = "import json, sys\nfrom refiner_ds.evaluate import main\nfor words in json.load(sys.stdin):\n    print('code', main(words), flush=True)"  # noqa: E501


class Suites:
    """A model, miniature sets of what it thinks of them, and what the command said."""

    def __init__(self, place: Path) -> None:
        self.place, self.env = place, environment(REFINER_DS_CACHE=str(place / "cache"))
        self.model = self._model()
        self.right = {name: self._folders(name) for name in ("imagenet", "v2", "a", "r", "sketch")}
        self.spec = f"timm:test_vit={place / 'weights.safetensors'}"
        named = [f"{name}={place / name}" for name in ("a", "r", "v2", "sketch")]
        named += [f"real={place / 'imagenet'}", f"c={place / 'imagenet'}"]
        few = ["--corruptions", "fog", "pixelate", "--severities", "1", "5"]
        self.words = [self.spec, "--partial", "--json", "--batch", "5", *few, "--data", *named]
        other, empty = self._other_classes(), self._empty()
        refused = [
            [self.spec, "--data", f"a={place / 'a'}"],
            [self.spec, "--partial", "--data", f"imagenet={other}"],
            [self.spec, "--data", str(other)],
            [self.spec, "--data", str(other), "--classes", str(self._names("as_excel_does", "\ufeff", "\r\n"))],
            [self.spec, "--data", str(other), "--classes", str(self._names("twice", "tench\ntench\n"))],
            [self.spec, "--data", str(empty)],
            [self.spec, "--data", str(place / "a"), str(place / "a")],
            [str(place / "a"), "--data", str(place / "a")],
            ["timm:no_such_model", "--data", str(place / "a")],
            [self.spec],
        ]
        self.told = self.say([[*self.words, "--out", str(place / "one")], *refused])
        self.on_two = ranks(
            ROOT / "refiner_ds" / "evaluate.py", *self.words, "--out", place / "two", cwd=place, env=self.env
        )

    def say(self, commands: list[list[str]]) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", SEVERAL], input=json.dumps(commands), text=True, capture_output=True,
            cwd=self.place, env=self.env, timeout=280,
        )  # fmt: skip

    def _model(self) -> torch.nn.Module:
        torch.manual_seed(1)
        model = timm.create_model("test_vit").eval()
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # fresh heads say almost the same of every image
        save_file(model.state_dict(), self.place / "weights.safetensors")
        return model

    @torch.inference_mode()
    def _folders(self, kind: str) -> Counter[str]:
        """Write the images of a set; how many the model gets right: first, among five, and within the set's classes."""
        config = resolve_data_config(pretrained_cfg=self.model.pretrained_cfg, use_test_size=True)
        transform = create_transform(**config, is_training=False)
        rng = np.random.default_rng(len(kind))
        photos = load_sample_images().images
        numbers: Any = range(1000)
        if kind in ("a", "r"):
            numbers = [SYNSETS.index(name) for name in imagenet_synsets(f"imagenet_{kind}")]
        right: Counter[str] = Counter()
        drawn = []
        for number in range(IMAGES):
            photo = photos[number % len(photos)]
            top, left = rng.integers(0, 150), rng.integers(0, 300)
            picture = Image.fromarray(photo[top : top + 200 + 9 * number, left : left + 260])
            file = self.place / f"{kind}-{number}.jpg"
            picture.save(file, quality=95)
            logits_C = self.model(transform(Image.open(file).convert("RGB"))[None])[0]
            wanted = logits_C[list(numbers)].argsort(descending=True)
            drawn.append((file, logits_C, numbers[int(wanted[(0, 0, 3)[number % 3]])]))
        present = sorted({label for _, _, label in drawn})
        for number, (file, logits_C, label) in enumerate(drawn):
            folder = self.place / kind / (str(label) if kind == "v2" else SYNSETS[label])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(file, folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
            right["top1"] += int(logits_C.argmax()) == label
            right["top5"] += label in logits_C.topk(5).indices.tolist()
            right["restricted"] += present[int(logits_C[present].argmax())] == label
        if kind == "imagenet":
            # ReaL takes the model's first guess for the third image, either of two for the fourth; two have no labels.
            labels: list[list[int]] = [[label] for _, _, label in drawn] + [[]] * (50_000 - IMAGES)
            labels[2] = [int(drawn[2][1].argmax())]
            labels[3] = [drawn[3][2], 5]
            labels[0] = labels[1] = []
            (self.place / kind / "real.json").write_text(json.dumps(labels))
            firsts = [int(logits_C.argmax()) for _, logits_C, _ in drawn]
            right["real"] = sum(first in row for first, row in zip(firsts, labels[:IMAGES], strict=True))
        return right

    def _other_classes(self) -> Path:
        (self.place / "other" / "birds").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(self.place / "other" / "birds" / "one.png")
        return self.place / "other"

    def _names(self, name: str, before: str, end: str = "\n") -> Path:
        (self.place / name).write_text(before + "".join(synset + end for synset in imagenet_synsets()) + end)
        return self.place / name

    def _empty(self) -> Path:
        with SetWriter(self.place / "empty", ["n01440764"], 10):
            pass
        return self.place / "empty"

    def found(self, printed: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        return {line["set"]: line for line in lines}


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Suites:
    made = Suites(tmp_path_factory.mktemp("suites"))
    assert made.told.returncode == 0, made.told.stderr[-4000:]
    return made


def test_counts_of_every_set_are_those_of_timms_own_transform(suites: Suites) -> None:
    found = suites.found(suites.told.stdout)
    names = {"imagenet": "imagenet", "v2": "imagenetv2", "a": "imagenet-a", "r": "imagenet-r", "sketch": "sketch"}
    for kind, name in names.items():
        right = suites.right[kind]
        assert 0 < right["restricted"] < IMAGES and found[name]["images"] == IMAGES
        assert (found[name]["right1"], found[name]["right5"]) == (right["top1"], right["top5"]), name
        assert found[name]["restricted"]["right1"] == right["restricted"] >= right["top1"]
        low, high = found[name]["top1_interval"]
        assert 0 <= low <= found[name]["top1"] < high < 100 and found[name]["whole"] is False
    assert found["imagenet"]["real"]["right1"] == suites.right["imagenet"]["real"]
    assert found["imagenet"]["real"]["images"] == IMAGES - 2  # images without labels are left out


def test_two_processes_find_exactly_what_one_does(suites: Suites) -> None:
    assert suites.on_two.returncode == 0, suites.on_two.stderr[-3000:]
    one = suites.found(suites.told.stdout)
    assert one == suites.found(suites.on_two.stdout)  # losses, calibration and confusions included, to the last digit
    for file in sorted((suites.place / "one").iterdir()):
        assert file.read_bytes() == (suites.place / "two" / file.name).read_bytes(), file.name


def test_tables_are_in_timms_columns(suites: Suites) -> None:
    with open(suites.place / "one" / "results-imagenet-a.csv") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == "model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation".split()
    found = suites.found(suites.told.stdout)["imagenet-a"]
    assert float(row["top1"]) == round(found["top1"], 4) and float(row["top1_err"]) == round(100 - found["top1"], 4)
    parameters = sum(p.numel() for p in suites.model.parameters())
    assert (row["model"], row["img_size"], float(row["param_count"])) == ("test_vit", "160", round(parameters / 1e6, 2))
    assert {"results-imagenet-a-restricted.csv", "results-imagenet-real.csv", "imagenet_classes.csv"} <= {
        file.name for file in (suites.place / "one").iterdir()
    }
    with open(suites.place / "one" / "imagenet_classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in rows) == IMAGES
    assert sum(int(row["right"]) for row in rows) == suites.right["imagenet"]["top1"]
    assert sum(pair["images"] for pair in found["confusions"]) == IMAGES - found["right1"]


def test_corruptions_are_evaluated_from_one_decoding(suites: Suites) -> None:
    found = suites.found(suites.told.stdout)["imagenet-c"]
    assert set(found["by_severity"]) == {"fog", "pixelate"} and set(found["by_severity"]["fog"]) == {"1", "5"}
    assert found["mce"] is None and found["images"] == IMAGES
    errors = [row["top1_err"] for name in found["by_severity"].values() for row in name.values()]
    assert found["mean_error"] == pytest.approx(np.mean(errors))


def test_what_cannot_be_evaluated_is_refused_in_one_sentence(suites: Suites) -> None:
    codes = [int(line.split()[1]) for line in suites.told.stdout.splitlines() if line.startswith("code ")]
    assert codes == [0] + [REFUSED] * 10
    errors = [line for line in suites.told.stderr.splitlines() if line.startswith("error: ")]
    wanted = (
        "classes where imagenet-a has 7,500 images in 200 classes; n01498041 is missing",
        "'birds' is none of the 1,000 synsets of imagenet",
        "'birds' first, is not among the 1000 that the run was trained on",
        "'birds' first, is not among the 1000 that the run was trained on",
        "twice: names tench twice",
        "holds no images",
        "two sets are called a; name them",
        "holds no checkpoint",
        "timm knows no model of that name",
        "give --data SET",
    )
    assert len(errors) == len(wanted)
    for error, sentence in zip(errors, wanted, strict=True):
        assert sentence in error
