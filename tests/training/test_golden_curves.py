"""Two short runs whose losses are recorded: code that is moved or renamed must not move them by a bit.

    released   score maps, mix-token, drop-path, recomputed pairs, gradient accumulation, ZeRO 1
    paper      labels, mixup and CutMix, dropout, one accumulation step, ZeRO 2

Each runs the training command in two processes in fp32. Another CPU rounds differently, so golden/curves.json holds one
recording for each kind of CPU: bit-equal where the kind matches, near everywhere else.

    python -m tests.training.test_golden_curves    records this CPU anew (only where results are meant to change)
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.launched import ROOT, ranks, run

RECORDED = Path(__file__).parent / "golden" / "curves.json"
NEAR = 1e-2  # relative; gates of ReLU6 that flip on another CPU move a loss by up to 7e-4, another sample by percents
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}

# Every key that decides a number is written out: defaults may change, these runs may not.
PLAIN_RECIPE = {
    "lr": 2e-3, "lr_batch": None, "schedule": "cosine", "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_epochs": 1,
    "weight_decay": 0.05, "betas": [0.9, 0.999], "eps": 1e-8, "ema_decay": 0.9, "ema_warmup": True,
    "crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.3333], "hflip": 0.5, "auto_augment": "", "color_jitter": 0,
    "interpolation": "bilinear", "random_erasing": 0.25, "random_erasing_mode": "const", "mix_probability": 1.0,
    "mix_switch": 0.5, "label_smoothing": 0.1, "dense_weight": 0.5, "cls_weight": 1.0,
}  # fmt: skip
TINY_MODEL = {
    "name": "refined_vit", "img_size": 32, "patch_size": 8, "stem_chs": [4, 4, 8], "embed_dim": 24, "depth": 4,
    "num_heads": 2, "mlp_ratio": 2, "kernel_size": 3,
}  # fmt: skip
EVERY_STEP = {"seed": 7, "log_steps": 1, "eval_epochs": 100, "checkpoint_epochs": 100, "picture_epochs": None}


def run_file(case: str, data: Path, output: Path) -> dict[str, Any]:
    released = case == "released"
    layout = {"layout": "released", "refiner": "bottleneck", "expansion_ratio": 3, "checkpointing": "pair"}
    if not released:
        layout = {"layout": "paper", "refiner": "linear", "expansion_ratio": 2, "checkpointing": "none", "drop": 0.1}
    mixing = {"mixup": 0, "cutmix": 0, "mix_token": True} if released else {"mixup": 0.8, "cutmix": 1.0}
    return {
        "refiner": {
            "model": {**TINY_MODEL, **layout, "drop_path": 0.1, "attention": "tiled"},
            "data": {"train": str(data), "val": str(data), "score_maps": released, "workers": 0, "eval_crop_ratio": 1},
            "recipe": {**PLAIN_RECIPE, **mixing, "epochs": 4, "cooldown_epochs": 1},
            "run": {**EVERY_STEP, "output": str(output), "name": case},
        },
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4 if released else 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1 if released else 2},
        "bf16": {"enabled": False},
    }


def write_pictures(folder: Path) -> None:
    """48 PNGs in three classes and their published score maps, by integer arithmetic: the same bytes everywhere."""
    y, x = np.mgrid[0:32, 0:40]
    for number, (name, colour) in enumerate(sorted(COLOURS.items())):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "maps" / name).mkdir(parents=True)
        for image in range(16):
            noise = (x * (7 + image) + y * (13 + number) + x * y * (3 + image)) % 61 - 30
            pixels = np.clip(np.array(colour) + noise[..., None], 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{image}.png")
            cells = torch.arange(36).reshape(6, 6)
            values = torch.stack([8 + (cells * (image + 1)) % 5, (cells + image) % 3, cells * 0])
            classes = torch.stack([(number + place + (cells > 30).long()) % 3 for place in range(3)])
            torch.save(torch.stack([values, classes]).half(), folder / "maps" / name / f"{image}.pt")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return record(tmp_path_factory.mktemp("golden"))


def record(folder: Path) -> dict[str, list[float]]:
    """Losses of every step and of both evaluations at the end, by case."""
    shards = shards_of(folder)
    return {case: train(case, shards, folder) for case in ("released", "paper")}


def shards_of(folder: Path) -> Path:
    """The pictures and maps as a shard set."""
    write_pictures(folder)
    shards = folder / "set"
    made = run(
        sys.executable, "-m", "data_tools.shard", folder / "images", shards, "--maps", folder / "maps",
        "--processes", "1",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return shards


def train(case: str, shards: Path, folder: Path) -> list[float]:
    file = folder / f"{case}.json"
    file.write_text(json.dumps(run_file(case, shards, folder / "runs")))
    done = ranks(ROOT / "refiner_ds" / "train.py", "--config", file, timeout=180)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    lines = (folder / "runs" / case / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def kind_of_cpu() -> str:
    """What decides rounding: torch's version and instructions, and, for what no name tells, how this CPU rounds."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5, 96, 96, generator=generator)
    sums = torch.nn.functional.conv2d(left[None, :4], right[None, :4].transpose(0, 1)[:, :, :3, :3], groups=4)
    samples = (left @ right, left.softmax(-1), left.exp(), torch.nn.functional.gelu(right), left.sum((1, 2)), sums)
    rounding = hashlib.sha256(b"".join(sample.numpy().tobytes() for sample in samples)).hexdigest()[:8]
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__.split('+')[0]}, {capability} {bf16} bf16, rounding {rounding}"


def hash_of(curve: list[float]) -> str:
    return hashlib.sha256(" ".join(loss.hex() for loss in curve).encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", ["released", "paper"])
def test_losses_of_a_short_run_are_those_recorded(
    curves: dict[str, list[float]], case: str, record_property: Any
) -> None:
    recorded, kind = json.loads(RECORDED.read_text()), kind_of_cpu()
    curve = curves[case]
    print(f"golden curve {case}: {hash_of(curve)} ({kind})")
    record_property("golden_curve", hash_of(curve))
    if kind in recorded:
        golden = [float.fromhex(loss) for loss in recorded[kind][case]]
        assert hash_of(curve) == hash_of(golden), f"{case}: {curve} instead of {golden}"
    for wanted in recorded.values():
        assert curve == pytest.approx([float.fromhex(loss) for loss in wanted[case]], rel=NEAR)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = record(Path(folder))
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recorded[kind_of_cpu()] = {case: [loss.hex() for loss in curve] for case, curve in curves.items()}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    for case, curve in curves.items():
        print(f"{case}: {hash_of(curve)} ({kind_of_cpu()})", *curve, sep="\n  ")


if __name__ == "__main__":
    main()
