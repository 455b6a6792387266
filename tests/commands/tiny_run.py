"""A run folder with a checkpoint that nobody trained: for what reads runs, not for what is learned in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from refiner_ds.checkpoint.files import CLASSES, CONFIG, MANIFEST
from refiner_ds.config import load
from refiner_ds.files import sha256_of
from refiner_ds.models import RefinedViT
from refiner_ds.run_folder import STATE, RunFolder, State
from refiner_ds.training.build import build_model

CLASSES_OF_RUN = ["ant", "bee", "cat", "dog", "eel", "fox"]


def write_run(output: Path, name: str = "tiny", steps: tuple[int, ...] = (10,), **model: object) -> Path:
    """Write ``<output>/<name>`` with a checkpoint a step, of other weights each; returns the run folder."""
    keys = {"run.output": str(output), "run.name": name, "data.eval_crop_ratio": 0.9}
    keys |= {f"model.{key}": value for key, value in {"embed_dim": 24, "num_heads": 2, **model}.items()}
    run_file = load(None, [f"refiner.{key}={json.dumps(value)}" for key, value in keys.items()])
    run = RunFolder(run_file.folder)
    for step in steps:
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        for which in ("model", "ema"):
            save_file(
                seasoned(build_model(run_file, len(CLASSES_OF_RUN)), step).state_dict(), folder / f"{which}.safetensors"
            )
        (folder / CLASSES).write_text(json.dumps(CLASSES_OF_RUN))
        (folder / CONFIG).write_text(json.dumps(run_file.resolved()))
        (folder / STATE).write_text(json.dumps(asdict(State(step, 48 * step, step / 30, 1))))
        listed = {file.name: (file.stat().st_size, sha256_of(file)) for file in folder.iterdir()}
        (folder / MANIFEST).write_text(json.dumps(listed))
        run.latest_file.write_text(folder.name)
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.write_text(json.dumps(run_file.resolved()))
    return run.path


def seasoned(model: RefinedViT, seed: int) -> RefinedViT:
    """The model with weights as far from their initial values as training takes them, so that logits differ."""
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        if "running_var" in name or "scale_channel" in name or ("bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif name.startswith(("head", "aux_head")):
            value.normal_(std=0.3)
    return model
