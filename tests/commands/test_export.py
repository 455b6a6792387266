"""An export is what the run evaluates, to the bit; its card says what the run folder holds; one command uses it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_image

import refiner_ds.export.onnx_file as onnx_file
from refiner_ds.analysis.loading import load_model
from refiner_ds.analysis.looking import class_token_heat, default_block
from refiner_ds.classify import main as classify
from refiner_ds.export.__main__ import main as export
from refiner_ds.export.card import SCRIPT
from refiner_ds.run_folder import CALIBRATION, RunFolder
from tests.commands.tiny_run import CLASSES_OF_RUN, write_run
from tests.packaging.test_inference_install import run as run_with_timm_alone
from tests.training.launched import ROOT

CALIBRATED = {
    "crop_ratio": 1.15, "own_crop_ratio": 0.9, "set": "zoo", "held_out_images": 100, "images": 400,
    "difference": 2.5, "difference_interval": [0.5, 4.5],
}  # fmt: skip
EVALUATED = {"set": "zoo", "images": 500, "crop_ratio": 0.9, "top1": 71.2, "top1_interval": [67.1, 75.0], "top5": 99.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def picture(run: Path) -> Path:
    file = run.parent / "flower.png"
    Image.fromarray(load_sample_image("flower.jpg")[:300:4, :400:4]).save(file)
    return file


def card_of(folder: Path) -> tuple[dict, str]:
    front, body = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


@pytest.mark.slow
def test_logits_are_the_runs_to_the_bit_where_timm_is_alone(run: Path, picture: Path, tmp_path: Path) -> None:
    """A fresh process that can import nothing of what trains; the page's ten lines print what the command prints."""
    assert export([str(run)]) == 0
    assert SCRIPT in (ROOT / "docs" / "evaluating.md").read_text() and len(SCRIPT.splitlines()) == 10
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "images.npy", images.numpy())
    (tmp_path / "script.py").write_text(SCRIPT)
    program = f"""
import runpy, numpy, timm, torch
import refiner_ds.models
model = timm.create_model("local-dir:{run}/export", pretrained=True).eval()
with torch.inference_mode():
    numpy.save("logits.npy", model(torch.from_numpy(numpy.load("images.npy"))).numpy())
sys.argv = ["script.py", "{run}/export", "{picture}"]
runpy.run_path("script.py")
"""
    done = run_with_timm_alone(program, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.inference_mode():
        wanted = load_model(str(run)).model(images).numpy()
    assert np.abs(wanted).max() > 0.1 and np.array_equal(np.load(tmp_path / "logits.npy"), wanted)
    lines = [line.split() for line in done.stdout.splitlines()[-5:]]
    told = looked_at([str(run), str(picture)], tmp_path)
    assert [name for _, name in lines] == [name for name, _ in told["classes"]]
    assert [float(share.rstrip("%")) for share, _ in lines] == [
        pytest.approx(100 * share, abs=0.006) for _, share in told["classes"]
    ]


def looked_at(words: list[str], out: Path) -> dict:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert classify([*words, "--json", "--out", str(out)]) == 0
    return json.loads(printed.getvalue().splitlines()[-1])


def test_the_calibrated_crop_ratio_goes_into_the_export(run: Path, tmp_path: Path) -> None:
    results = RunFolder(run).results(10, "ema")

    def crop_of(*words: str) -> float:
        assert export([str(run), "--out", str(tmp_path / "export"), *words]) == 0
        return json.loads((tmp_path / "export" / "config.json").read_text())["pretrained_cfg"]["crop_pct"]

    assert crop_of() == 0.9
    results.mkdir(parents=True)
    (results / CALIBRATION).write_text(json.dumps(CALIBRATED))
    try:
        assert crop_of() == 1.15 and crop_of("--crop-ratio", "1.3") == 1.3
        assert crop_of("--weights", "model") == 0.9 and crop_of("--test-size", "36") == 0.9  # calibrated on neither
        larger = load_model(str(tmp_path / "export"))
        assert larger.view.img_size == 36 and larger.model.patch_grid == (9, 9)
    finally:
        (results / CALIBRATION).unlink()


def test_the_card_holds_what_the_run_folder_does_and_no_more(run: Path, tmp_path: Path) -> None:
    words = [str(run), "--out", str(tmp_path / "export")]
    assert export(words) == 0
    front, body = card_of(tmp_path / "export")
    assert front["library_name"] == "timm" and front["license"] == "unknown" and "No licence was named" in body
    assert "Not measured" in body and "| set |" not in body and str(run.parent) not in body
    results = RunFolder(run).results(10, "ema")
    results.mkdir(parents=True, exist_ok=True)
    files = {"zoo.json": EVALUATED, CALIBRATION: CALIBRATED}
    metrics = [
        {"kind": "eval", "step": step, "weights": "ema", "top1": top1, "top5": 98.0}
        for step, top1 in ((9, 1.25), (10, 70.5))
    ]
    try:
        for name, content in files.items():
            (results / name).write_text(json.dumps(content))
        RunFolder(run).metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        assert export([*words, "--license", "cc-by-4.0"]) == 0
        front, body = card_of(tmp_path / "export")
        assert front["license"] == "cc-by-4.0" and "The weights: cc-by-4.0." in body
        assert "| zoo | 500 | 0.9 | 71.20 | 67.10 to 75.00 | 99.00 |" in body
        assert "| 70.50 |" in body and "1.25" not in body and "+2.50 points (+0.50 to +4.50) against 0.9" in body
        assert "| `refiner.recipe.lr` | 0.003 |" in body and SCRIPT in body
        assert export([*words, "--weights", "model"]) == 0
        assert "Not measured" in card_of(tmp_path / "export")[1]  # the figures are of other weights
    finally:
        for name in files:
            (results / name).unlink()
        RunFolder(run).metrics.unlink()


@pytest.mark.slow
def test_onnx_is_compared_with_the_model_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, out = write_run(tmp_path / "runs", depth=2), tmp_path / "export"
    assert export([str(run), "--onnx", "--out", str(out)]) == 0
    assert "model.onnx: logits differ by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 28, 28)
    (found,) = session.run(["logits"], {"image": images.numpy()})
    with torch.inference_mode():
        wanted = load_model(str(out)).model(images).numpy()
    assert (
        np.abs(found - wanted).max() < onnx_file.TOLERANCE * np.abs(wanted).max()
        and "`model.onnx` takes" in card_of(out)[1]
    )
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    monkeypatch.setattr(onnx_file, "TOLERANCE", 0.0)
    assert export([str(run), "--onnx", "--out", str(out)]) == 2
    assert "its logits differ from the model's by" in capsys.readouterr().err
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export", "runs"]  # no draft is left


def test_heat_is_the_class_tokens_row_after_refining(run: Path, picture: Path, tmp_path: Path) -> None:
    loaded = load_model(str(run))
    assert default_block(loaded.model) == 3
    images = torch.randn(2, 3, 28, 28)
    heat = class_token_heat(loaded.model, images, 3)
    row = loaded.model.attention_maps(images)[3][1, :, 0, 1:].abs().mean(0)
    assert heat.shape == (2, 7, 7) and torch.allclose(heat[1].flatten(), row / row.sum())
    assert not torch.allclose(heat, class_token_heat(loaded.model, images, 2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "flower.png").write_bytes(picture.read_bytes())
    told = looked_at(
        [str(run), str(picture), str(tmp_path / "other" / "flower.png"), "--top", "2"], tmp_path / "looked"
    )
    assert {name for name, _ in told["classes"]} < set(CLASSES_OF_RUN) and len(told["classes"]) == 2
    assert sorted(file.name for file in (tmp_path / "looked").iterdir()) == ["flower-2.png", "flower.png"]
    assert Image.open(tmp_path / "looked" / "flower.png").width > 600


def test_what_is_no_picture_is_refused_before_anything_is_written(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "empty.jpg").touch()
    good, out = str(picture), str(tmp_path / "looked")
    for words, said in (
        ([str(run), good, str(tmp_path)], "is a folder; give image files"),
        ([str(run), good, str(tmp_path / "none.jpg")], "none.jpg: cannot be read"),
        ([str(run), good, str(tmp_path / "notes.jpg")], "notes.jpg: the image cannot be decoded"),
        ([str(run), good, str(tmp_path / "cut.png")], "cut.png: the image cannot be decoded"),
        ([str(run), good, str(tmp_path / "empty.jpg")], "empty.jpg: the image cannot be decoded"),
        ([str(tmp_path), good], "holds no checkpoint"),
        ([str(run), good, "--block", "4"], "--block 4: tiny has 4 blocks"),
        (["timm:test_vit", good], "its attention cannot be drawn"),
    ):
        assert classify([*words, "--out", out]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not Path(out).exists()
