"""The model card of an export: what it is, how it was trained, what it was measured to do in this run, how to load it.

Only figures of the run itself are in it. Places of data are cut down to their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from refiner_ds.checkpoint.files import DATA
from refiner_ds.config import RunFile
from refiner_ds.export.onnx_file import TOLERANCE
from refiner_ds.files import has_numbers, read_object, read_objects
from refiner_ds.run_folder import CALIBRATION, RunFolder, read_state
from refiner_ds.training.metrics import read_metrics

__all__ = ["SCRIPT", "Subject", "model_card"]

DAMAGED = (KeyError, TypeError, ValueError)  # what formatting a result that is none ends in
START_KEYS = {"versions", "world_size", "device", "zero_stage", "bf16", "commit"}
PAPER = "https://arxiv.org/abs/2106.03714"
SCRIPT = """\
import sys, timm, torch, refiner_ds.models  # the last registers the architectures
from PIL import Image

model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open(sys.argv[2]).convert("RGB"))[None])[0]
names = model.pretrained_cfg["label_names"]
for probability, number in zip(*logits.softmax(-1).topk(min(5, len(logits)))):
    print(f"{probability:7.2%}  {names[number]}")
"""


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        results: the folder of these weights' evaluation results, which need not exist; None outside a run.
    """

    run: RunFile
    checkpoint: Path
    weights: str
    classes: list[str]
    side: int
    crop_ratio: float
    crop_source: str
    results: Path | None
    license: str | None


def model_card(subject: Subject, model: nn.Module, onnx_difference: float | None) -> str:
    """README.md, in Markdown, with the Hub's front matter."""
    run, state = subject.run, read_state(subject.checkpoint)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    data = run.refiner.data
    which = "EMA weights" if subject.weights == "ema" else "Weights"
    parts = [
        "---", "library_name: timm", "pipeline_tag: image-classification",
        f"license: {subject.license or 'unknown'}", "tags:", "- image-classification", "- timm", "- refiner", "---", "",
        f"# {run.folder.name}", "",
        f"Refined-ViT (*Refiner: Refining Self-attention for Vision Transformers*, [arXiv 2106.03714]({PAPER})),"
        f" architecture `{run.refiner.model.name}`, trained with refiner_ds. {which} of step {state.step:,}"
        f" (epoch {state.epoch:g}).", "",
        "| | |", "| --- | --- |",
        f"| parameters | {millions:.2f} M |",
        f"| classes | {len(subject.classes):,}, named in `config.json` |",
        f"| image | {subject.side}×{subject.side} pixels, crop ratio {subject.crop_ratio:g} ({subject.crop_source}),"
        " bicubic |",
        f"| normalisation | mean {list(data.mean)}, standard deviation {list(data.std)}, of pixels in [0, 1] |",
        "", "## Figures", "", *_figures(subject, state.step),
        "", "## Recipe", "", *_recipe(subject),
        "", "## Loading", "", *_loading(onnx_difference),
        "", "## Licence", "",
        f"The weights: {subject.license}." if subject.license else
        "No licence was named for the weights when they were exported; ask whoever trained them.",
        "The code of refiner_ds is under Apache-2.0. What the training images allow is another question.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _figures(subject: Subject, step: int) -> Iterator[str]:
    rows = [*_measured_in_training(subject, step), *_evaluated(subject)]
    if not rows:
        yield "Not measured: the run folder holds no evaluation of these weights."
        return
    yield "Measured in this run, on these weights; intervals are 95 %, Wilson's."
    yield ""
    yield "| set | images | crop ratio | top-1, % | interval | top-5, % |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from rows
    calibration = _read(subject.results, CALIBRATION)
    if calibration is not None and (sentence := _calibration(calibration)):
        yield ""
        yield sentence


def _calibration(found: dict[str, Any]) -> str:
    try:
        low, high = found["difference_interval"]
        return (
            f"Receptive-field calibration on {found['set']}: crop ratio {found['crop_ratio']:g} was chosen"
            f" on {found['held_out_images']:,} images; on the other {found['images']:,} it changes top-1"
            f" by {found['difference']:+.2f} points ({low:+.2f} to {high:+.2f}) against"
            f" {found['own_crop_ratio']:g}."
        )
    except DAMAGED:
        return ""


def _measured_in_training(subject: Subject, step: int) -> list[str]:
    folder = subject.checkpoint.parents[1]
    trained_size = subject.side == subject.run.refiner.model.img_size
    if subject.results is None or not trained_size:
        return []
    lines = [line for line in read_metrics(folder, "eval") if line["step"] == step
             and line.get("weights") == subject.weights and has_numbers(line, "top1", "top5")]  # fmt: skip
    ratio = subject.run.refiner.data.eval_crop_ratio
    return [
        f"| validation, while training | | {ratio:g} | {line['top1']:.2f} | | {line['top5']:.2f} |"
        for line in lines[-1:]
    ]


def _evaluated(subject: Subject) -> list[str]:
    rows = []
    for file in sorted(subject.results.glob("*.json")) if subject.results is not None else []:
        found = _read(subject.results, file.name)
        if found is None or file.name == CALIBRATION or "top1_interval" not in found:
            continue
        with suppress(*DAMAGED):
            low, high = found["top1_interval"]
            rows.append(
                f"| {found['set']} | {found['images']:,} | {found['crop_ratio']:g} | {found['top1']:.2f} |"
                f" {low:.2f} to {high:.2f} | {found['top5']:.2f} |"
            )
    return rows


def _read(folder: Path | None, name: str) -> dict[str, Any] | None:
    return None if folder is None else read_object(folder / name)


def _recipe(subject: Subject) -> Iterator[str]:
    run = subject.run
    resolved = run.resolved()
    start = _last_start(subject)
    data = _read(subject.checkpoint, DATA) or RunFolder(subject.checkpoint.parents[1]).trained_on() or {}
    name, known = _name(run.refiner.data.train), ""
    with suppress(*DAMAGED):
        train = data["train"]
        known = f", {train['images']:,} images (content sha256 {train['content_sha256'][:16]}…)"
        name = _name(train["place"])
    yield f"Trained on {name}{known}; global batch {resolved.get('train_batch_size')}, seed {run.refiner.run.seed}."
    if start is not None:
        versions = ", ".join(f"{package} {version}" for package, version in start["versions"].items())
        processes = f"{start['world_size']} {'process' if start['world_size'] == 1 else 'processes'}"
        yield (
            f"Last started on {processes} ({start['device']}), ZeRO stage {start['zero_stage']},"
            f" {'bf16' if start['bf16'] else 'fp32'}, commit `{start['commit']}`; {versions}."
        )
    yield ""
    yield "| key | value |"
    yield "| --- | --- |"
    for section in ("model", "recipe"):
        for key, value in resolved["refiner"][section].items():
            if value not in (None, [], "") and key != "init_from":
                yield f"| `refiner.{section}.{key}` | {json.dumps(value)} |"
    if run.refiner.model.init_from:
        yield f"| `refiner.model.init_from` | {_name(run.refiner.model.init_from)} |"


def _last_start(subject: Subject) -> dict[str, Any] | None:
    starts = read_objects(RunFolder(subject.checkpoint.parents[1]).history)
    whole = [one for one in starts if one.keys() >= START_KEYS and isinstance(one["versions"], dict)]
    return whole[-1] if whole else None


def _name(place: str | None) -> str:
    """A set's name without the folders of one machine."""
    text = str(place)
    return f"`{text if '://' in text or text.startswith('package:') else Path(text).name}`"


def _loading(onnx_difference: float | None) -> Iterator[str]:
    yield "Install `refiner_ds` (`pip install .` in its clone; torch and timm come with it), and run"
    yield "`python classify.py FOLDER PICTURE` with the folder of this file:"
    yield ""
    yield "```python"
    yield from SCRIPT.splitlines()
    yield "```"
    yield ""
    yield "`python -m refiner_ds.classify FOLDER PICTURE` also draws where the model looked. From the Hub,"
    yield "`hf-hub:OWNER/NAME` stands for `local-dir:FOLDER`."
    if onnx_difference is not None:
        yield ""
        yield (
            "`model.onnx` takes `image` [batch, 3, side, side], normalised as above, and gives `logits`. In onnxruntime"
            f" they differ from PyTorch's by {onnx_difference:.0e} of the largest at most (limit {TOLERANCE:g})."
        )
