"""Calibrates models of whose best ratio something is known, counting what is decoded; writes what it found as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import refiner_ds.calibrate
import refiner_ds.data.dataset as loading
import refiner_ds.evaluate
from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.data.augment import EvalSettings, eval_view
from refiner_ds.data.writer import SetWriter
from refiner_ds.evaluation.calibration import RATIOS, calibrate, sweep, write_calibration
from refiner_ds.evaluation.command import Evaluator

SIDES = range(20, 42, 2)  # of squares, in pictures of 64 pixels: the classes
EACH = 4
BEST = 1.25
RATIO_WORDS = ["--ratios", "0.8", "1.2"]


def square(side: int, left: int) -> np.ndarray:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[12 : 12 + side, left : left + side] = 255
    return pixels


class SizeReader(nn.Module):
    """Knows squares by how large they look at one ratio, and takes others for the nearest."""

    num_classes = len(SIDES)

    def __init__(self) -> None:
        super().__init__()
        seen = [eval_view(square(side, 12), EvalSettings(32, BEST)) for side in SIDES]
        self.areas_C = torch.tensor([view.mean() / 255 for view in seen])

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return -(1000 * (images_B3HW.mean((1, 2, 3))[:, None] - self.areas_C)).square()


def write_set(folder: Path) -> Path:
    with SetWriter(folder, [f"side {side}" for side in SIDES], 20) as writer:
        for number in range(len(SIDES) * EACH):
            label = number % len(SIDES)
            buffer = io.BytesIO()
            Image.fromarray(square(SIDES[label], 8 + number // len(SIDES))).save(buffer, "PNG")
            writer.add(f"{number:03d}", buffer.getvalue(), "png", label)
    return folder


def count_decodes() -> list[int]:
    counts = [0]
    decode = loading.decode_image

    def counted(*arguments: Any) -> Any:
        counts[0] += 1
        return decode(*arguments)

    loading.decode_image = counted  # type: ignore[assignment]
    return counts


def said(main: Any, words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def known_best(place: Path, squares: Path) -> dict[str, Any]:
    options = Namespace(batch=60, workers=0)
    classes = [f"side {side}" for side in SIDES]
    loaded = LoadedModel("size reader", SizeReader(), EvalSettings(32, 0.9), (0.0,) * 3, (1.0,) * 3, classes=classes)
    evaluator = Evaluator(loaded, options)
    data = evaluator.open_set(str(squares))
    with evaluator.started():
        found = sweep(evaluator, data, RATIOS)
    result = evaluator.about(data, found.bad) | calibrate(found, 32, 0.25, 0)
    (place / "best").mkdir()
    write_calibration(place / "best", loaded, result)
    return result


def main(report: Path) -> None:
    place = report.parent
    squares, names = write_set(place / "squares"), place / "names.txt"
    names.write_text("\n".join(f"side {side}" for side in SIDES))
    decodes = count_decodes()
    found: dict[str, Any] = {"known": known_best(place, squares), "decodes": {"sweep": decodes[0]}}
    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(1)
        save_file(timm.create_model(name).state_dict(), place / f"{name}.safetensors")
        model = [f"timm:{name}={place / name}.safetensors", "--classes", str(names), "--data", str(squares), "--json"]
        one: dict[str, Any] = {"calibrate": json.loads(said(refiner_ds.calibrate.main, [*model, *RATIO_WORDS])[1])}
        decodes[0] = 0
        for ratio in RATIO_WORDS[1:]:
            one[ratio] = json.loads(said(refiner_ds.evaluate.main, [*model, "--crop-ratio", ratio])[1])
        found["decodes"][name] = decodes[0] / 2
        found[name] = one
    larger = said(
        refiner_ds.calibrate.main, [*model, *RATIO_WORDS, "--test-size", "96", "--out", str(place / "larger")]
    )
    found["larger"] = json.loads(larger[1])
    few = [*model, "--held-out", "0.01"]
    wrong = [few, [*model, "--ratios", "0"], [*model, "--held-out", "1"], [*model, "--data", f"c={squares}"], model[:3]]
    found["refused"] = [said(refiner_ds.calibrate.main, words)[::2] for words in wrong]
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
