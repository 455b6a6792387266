"""What a run shows in TensorBoard, read back with TensorBoard's own reader from a real run of two ranks."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refiner_ds.analysis.loading import load_model
from refiner_ds.config import load
from refiner_ds.gallery.__main__ import main as gallery
from refiner_ds.gallery.parts import gallery_parts
from refiner_ds.page import Picture, Text
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.build import training_flops
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.peak import TFLOPS, peak_flops_of
from refiner_ds.training.pictures import Views, views_picture
from tests.training.launched import ROOT, ranks
from tests.training.test_resume import arguments

STEPS, LOGGED = 6, [2, 4, 6]
KEYS = {
    "refiner.recipe.epochs": 0.2, "refiner.run.log_steps": 2, "refiner.run.picture_epochs": 0.1,
    "refiner.run.checkpoint_epochs": None, "refiner.run.checkpoint_steps": 2, "refiner.run.peak_tflops": 0.5,
    "refiner.model.drop_path": 0.0, "zero_optimization.stage": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tensorboard")
    done = ranks(ROOT / "refiner_ds" / "train.py", *arguments(output, **KEYS))
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "quickstart"


@pytest.fixture(scope="module")
def board(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def picture(board: EventAccumulator, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(board.Images(tag)[-1].encoded_image_string)))


def scalars(board: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in board.Scalars(tag)}


@pytest.mark.parametrize("tag, steps", [("views", [1, 3, 6]), ("attention", [3, 6])])
def test_pictures_are_drawn_at_their_steps_and_show_something(
    board: EventAccumulator, tag: str, steps: list[int]
) -> None:
    assert [image.step for image in board.Images(tag)] == steps
    assert picture(board, tag).std() > 20


def test_the_run_file_is_there_as_text(board: EventAccumulator, run: Path) -> None:
    text = board.Tensors("run file/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == json.loads(
        (run / "config.json").read_text()
    )


def test_gradient_norms_by_part_add_up_to_the_whole(board: EventAccumulator) -> None:
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("grad_norm/")]
    assert sorted(tags) == [
        f"grad_norm/{part}" for part in ("block_00", "block_01", "embeddings", "heads", "refiner_01", "stem")
    ]
    whole = scalars(board, "train/grad_norm")
    assert sorted(whole) == LOGGED
    for step, norm in whole.items():
        parts = [scalars(board, tag)[step] for tag in tags]
        assert min(parts) > 0 and math.hypot(*parts) == pytest.approx(norm, rel=1e-4)


def test_mfu_is_the_share_of_the_peak_that_the_run_file_names(board: EventAccumulator, run: Path) -> None:
    flops = training_flops(load(run / "config.json"), 10)
    speed = scalars(board, "train/images_per_second")
    for step, mfu in scalars(board, "train/mfu").items():
        assert mfu == pytest.approx(speed[step] * flops / (2 * 0.5e12), rel=1e-4)


@pytest.mark.parametrize("key", ["peak_memory_gib", "data_wait_seconds", "checkpoint_seconds", "step_seconds", "lr"])
def test_tensorboard_and_metrics_hold_the_same_numbers(board: EventAccumulator, run: Path, key: str) -> None:
    shown = scalars(board, f"train/{key}")
    assert sorted(shown) == LOGGED and all(value > 0 for value in shown.values() if key != "checkpoint_seconds")
    for line in read_metrics(run, "train"):
        assert shown[line["step"]] == pytest.approx(line[key], rel=1e-5)
    if key == "checkpoint_seconds":
        assert max(shown.values()) > 0


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.4),
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None), ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_a_gpus_peak_is_found_by_its_name(name: str, tflops: float | None) -> None:
    assert peak_flops_of(name) == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_every_gpu_in_the_table_is_found_by_its_own_name() -> None:
    assert {chip: peak_flops_of(f"NVIDIA {chip} 80GB") for chip in TFLOPS} == {
        chip: pytest.approx(1e12 * tflops) for chip, tflops in TFLOPS.items()
    }


def test_patches_of_views_have_the_colours_of_their_classes() -> None:
    """Two halves of a score map, a box, and a view whose label alone is known."""
    target_BPC = torch.zeros(2, 16, 5)
    target_BPC[:, :, 4] = 1
    target_BPC[0, :8] = torch.tensor([0, 0.9, 0.1, 0, 0])
    views = Views(torch.full((2, 32, 32, 3), 0.5), target_BPC.mean(1), target_BPC, (1, 1, 3, 4))
    drawn = views_picture(views, ["cat", "dog", "a class with a very long name", "fox", "hen"], (4, 4))
    below = drawn[drawn.shape[0] // 2 :, : drawn.shape[1] // 2].astype(int)
    red, blue = below[..., 0] - below[..., 2] > 60, below[..., 2] - below[..., 0] > 60
    assert red.sum() > 2000 and blue.sum() > 2000
    rows = np.arange(len(below))[:, None]
    assert (rows * red).sum() / red.sum() != (rows * blue).sum() / blue.sum()
    label_alone = Views(views.pixels_BHWC, views.target_BC, target_BPC[:, :1], (0, 0, 0, 0))
    assert views_picture(label_alone, ["cat"], (4, 4)).std() > 20


def test_a_gallery_shows_the_run_and_is_named_in_the_text_tab(run: Path) -> None:
    assert gallery([str(run), "--images", "8"]) == 0
    page = (run / "gallery.html").read_text()
    for heading in (
        "Training views",
        "Learning curves",
        "Attention maps",
        "Learned kernels",
        "Feature evolution",
        "What is",
    ):
        assert f"<h2>{heading}" in page
    assert page.count("<img") == 8 and page.count("<svg") == 2 and "Not shown" not in page
    assert "gallery/text_summary" in EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"]


def test_a_gallery_says_what_it_cannot_show_and_shows_the_rest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, folder = load_model(str(run)), RunFolder(run)
    assert loaded.run is not None
    for changed, said in (
        (replace(loaded, data=None), "Not shown: the run has no validation set"),
        (replace(loaded, classes=["cat", "dog"]), "is past the run's 2 classes"),
    ):
        parts = gallery_parts(changed, loaded.run, folder, 8, "ema")
        told = [part.text for part in parts if isinstance(part, Text)]
        assert sum(said in text for text in told) == 3
        assert sum(isinstance(part, Picture) for part in parts) == 6
    for words, said in (
        ([str(run / "tensorboard")], "holds no checkpoint"),
        ([str(run), "--images", "3"], "takes at least 4"),
        ([str(run), "--out", "page.txt"], "ends in .html"),
    ):
        assert gallery(words) == 2
        assert said in capsys.readouterr().err
