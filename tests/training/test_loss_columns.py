"""What is minimised, logged and checked is one number, whatever heads and penalties a run has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.config import load
from refiner_ds.errors import ConfigError
from tests.training.launched import ROOT, ranks

TINY = {
    "refiner.model.depth": 4, "refiner.model.embed_dim": 16, "refiner.model.num_heads": 2,
    "refiner.model.stem_chs": [4, 4, 4], "refiner.recipe.epochs": 0.2, "refiner.recipe.warmup_epochs": 0,
    "refiner.recipe.cooldown_epochs": 0, "refiner.run.log_steps": 1, "refiner.data.val": None,
    "refiner.recipe.lr": 1e-2, "refiner.recipe.cls_weight": 0.9, "refiner.model.cos_reg": 0.5,
}  # fmt: skip


def losses_of(output: Path, **keys: object) -> list[dict[str, float]]:
    settings = {**TINY, "refiner.run.output": str(output), **keys}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = ranks(ROOT / "refiner_ds" / "train.py", *arguments, processes=1)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    lines = (output / "quickstart" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "loss" in name} for line in lines]


def test_a_class_head_alone_is_trained_with_cos_reg_in_its_own_column(tmp_path: Path) -> None:
    keys = {"refiner.model.return_dense": False, "refiner.recipe.mix_token": False, "refiner.model.cos_reg_pairs": 2}
    lines = losses_of(tmp_path, **keys)
    assert len(lines) == 6
    for line in lines:
        assert set(line) == {"loss", "loss_cls", "loss_cos"}
        assert line["loss"] == pytest.approx(0.9 * line["loss_cls"] + line["loss_cos"], rel=1e-5)
        assert 0.25 < line["loss_cos"] <= 0.5  # of two pairs the first is constant: half of the weight
    assert len({line["loss_cos"] for line in lines}) == 6, "it is part of what is trained"


def test_the_dense_head_and_cos_reg_add_up_to_the_loss(tmp_path: Path) -> None:
    for line in losses_of(tmp_path):
        assert set(line) == {"loss", "loss_cls", "loss_patch", "loss_cos"}
        total = 0.9 * line["loss_cls"] + 0.5 * line["loss_patch"] + line["loss_cos"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_mix_token_without_a_dense_head_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"mix_token mixes labels of patches: set refiner.model.return_dense to true"):
        load(None, ["refiner.model.return_dense=false"])
