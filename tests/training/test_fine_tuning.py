"""A run starts from the weights of another, at another resolution, with layers frozen or learning more slowly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from refiner_ds.config import RunFile, load
from refiner_ds.config.schema import RefinerKeys
from refiner_ds.data.batch import Batch
from refiner_ds.errors import ConfigError
from refiner_ds.training.build import build_model
from refiner_ds.training.initial_weights import initial_weights
from refiner_ds.training.inputs import InputMaker
from refiner_ds.training.preparation import prepare
from tests.training.launched import ROOT, ranks
from tests.training.test_golden_curves import run_file, shards_of

LR, DECAY = 1e-3, 0.5


def weights_of(run: Path, which: str = "ema") -> dict[str, Tensor]:
    from refiner_ds.checkpoint.files import find_checkpoint, read_weights

    return read_weights(find_checkpoint(run), which)


def train(file: Path, keys: dict[str, Any], processes: int) -> str:
    file.write_text(json.dumps(keys))
    done = ranks(ROOT / "refiner_ds" / "train.py", "--config", file, processes=processes)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run at 32 px, and one from its weights at 48 px for one step; then the first is gone."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    shards = shards_of(folder)
    first = run_file("released", shards, folder / "runs")
    first["refiner"]["recipe"] |= {"epochs": 1, "cooldown_epochs": 0, "warmup_epochs": 0}
    train(folder / "first.json", first, processes=1)
    second = run_file("released", shards, folder / "runs")
    second["refiner"]["run"]["name"] = "larger"
    origin = folder / "runs" / "released"
    second["refiner"]["model"] |= {"img_size": 48, "init_from": str(origin), "freeze": ["patch_embed", "blocks.1.attn"]}
    second["refiner"]["recipe"] |= {
        "lr": LR, "schedule": "constant", "layer_decay": DECAY, "weight_decay": 0, "warmup_epochs": 0,
        "cooldown_epochs": 0, "epochs": 1 / 3, "eps": 1e-12,
    }  # fmt: skip
    second["zero_optimization"] = {"stage": 2}
    second["gradient_clipping"] = 0
    said = train(folder / "larger.json", second, processes=2)
    larger = folder / "runs" / "larger"
    found = {"said": said, "origin": weights_of(origin), "after": weights_of(larger, "model")}
    shutil.rmtree(origin)
    return {**found, "run": load(folder / "larger.json", ["refiner.recipe.epochs=2"])}


def test_it_starts_from_the_ema_weights_with_positions_resized(story: dict[str, Any]) -> None:
    assert "weights from " in story["said"] and "position embedding resized from 16 patches to 6x6" in story["said"]
    origin, after = story["origin"], story["after"]
    start = resample_abs_pos_embed(origin["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=1)
    assert (after["pos_embed"] - start).abs().max() <= LR * 1.01


def test_layers_learn_at_rates_that_decay_towards_the_stem(story: dict[str, Any]) -> None:
    """AdamW's first step moves every weight by its learning rate, whatever the gradient."""
    moved = {
        name: (value - story["origin"][name]).abs().max().item()
        for name, value in story["after"].items()
        if value.is_floating_point() and "running" not in name and name != "pos_embed"
    }
    layers = {"cls_token": 0, **{f"blocks.{index}.mlp.fc1.weight": 1 + index for index in range(4)}, "norm.weight": 4}
    for name, layer in {**layers, "head.weight": 5, "aux_head.weight": 5}.items():
        assert moved[name] == pytest.approx(LR * DECAY ** (5 - layer), rel=0.02), name


def test_frozen_layers_and_their_running_statistics_stay_to_the_bit(story: dict[str, Any]) -> None:
    frozen = [name for name in story["after"] if name.startswith(("patch_embed", "blocks.1.attn"))]
    assert any("running_mean" in name for name in frozen) and len(frozen) > 20
    assert [name for name in frozen if not torch.equal(story["after"][name], story["origin"][name])] == []
    moved = "blocks.3.attn.adapt_bn.running_mean"
    assert not torch.equal(story["after"][moved], story["origin"][moved])


def test_resuming_does_not_ask_for_the_weights_it_started_from(story: dict[str, Any]) -> None:
    assert not Path(story["run"].refiner.model.init_from).exists()
    assert prepare(story["run"], 2).finished() is None


def test_heads_start_afresh_where_classes_have_other_names(story: dict[str, Any]) -> None:
    run = story["run"]
    again = run.keys.model_copy(update={"refiner": _starting_from(run.refiner, run.folder)})
    model = build_model(run, 3)
    same, notes = initial_weights(RunFile(run.path, again), model, ["blue", "green", "red"])
    assert notes == [] and torch.equal(same["head.weight"], weights_of(run.folder)["head.weight"])
    other, notes = initial_weights(RunFile(run.path, again), model, ["one", "three", "two"])
    assert notes == ["heads start afresh: its classes have other names"]
    assert torch.equal(other["head.weight"], model.head.weight)


def test_layers_can_be_taken_alone_and_the_rest_starts_afresh(story: dict[str, Any]) -> None:
    run = story["run"]
    model = build_model(run, 3)
    own = {name: value.clone() for name, value in model.state_dict().items()}

    def taking(layers: list[str]) -> tuple[dict[str, Tensor], list[str]]:
        keys = _starting_from(run.refiner, run.folder)
        keys = keys.model_copy(update={"model": keys.model.model_copy(update={"init_layers": layers})})
        return initial_weights(RunFile(run.path, run.keys.model_copy(update={"refiner": keys})), model, ["a", "b", "c"])

    state, notes = taking(["patch_embed", "blocks.0"])
    saved = weights_of(run.folder)
    assert notes == ["patch_embed, blocks.0 alone, the rest starts afresh"]
    assert state.keys() == own.keys()
    for name, value in state.items():
        source = saved if name.startswith(("patch_embed.", "blocks.0.")) else own
        assert torch.equal(value, source[name]), name
    with pytest.raises(ConfigError, match="refiner.model.init_layers: patch_embde names no parameter; names"):
        taking(["patch_embde"])


def _starting_from(keys: RefinerKeys, place: Path) -> RefinerKeys:
    return keys.model_copy(update={"model": keys.model.model_copy(update={"init_from": str(place)})})


def test_score_map_targets_follow_the_resolution(story: dict[str, Any]) -> None:
    run = story["run"]
    model = build_model(run, 3)
    assert model.patch_grid == (6, 6)
    images = torch.zeros(4, 48, 48, 3, dtype=torch.uint8)
    batch = batch_of(images)
    inputs = InputMaker(run.refiner, 3, model.patch_grid, torch.float32)(batch, seed=1, epoch=0)
    assert inputs.target_BPC.shape == (4, 36, 3)


def test_mixup_ends_with_its_epoch_and_the_box_of_mix_token_does_not() -> None:
    keys = load(None, ["refiner.recipe.mixup=0.8", "refiner.recipe.mixup_off_epoch=2", "refiner.model.img_size=28"])
    inputs = InputMaker(keys.refiner, 10, (7, 7), torch.float32)
    images = torch.randint(256, (4, 28, 28, 3), dtype=torch.uint8)
    batch = batch_of(images)
    mixed, plain = inputs(batch, seed=1, epoch=1.99), inputs(batch, seed=1, epoch=2)
    unmixed = InputMaker(_without_mixup(keys.refiner), 10, (7, 7), torch.float32)(batch, seed=1, epoch=0)
    assert torch.equal(plain.images_B3HW, unmixed.images_B3HW) and not torch.equal(mixed.images_B3HW, plain.images_B3HW)
    assert plain.box == mixed.box


def batch_of(images: Tensor) -> Batch:
    labels = torch.tensor([0, 1, 2, 0])
    return Batch(images, labels, torch.arange(4), torch.ones(4, dtype=torch.bool))


def _without_mixup(keys: RefinerKeys) -> RefinerKeys:
    return keys.model_copy(update={"recipe": keys.recipe.model_copy(update={"mixup": 0.0, "cutmix": 0.0})})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["refiner.model.init_from=nowhere"], r"refiner.model.init_from \S+nowhere does not exist; give a run folder"),
        (["refiner.model.init_from=README.md"], r"refiner.model.init_from: \S+README.md cannot be read as weights"),
        (["refiner.model.init_from=docs"], r"refiner.model.init_from: \S+docs: holds no checkpoint"),
        (['refiner.model.init_layers=["patch_embed"]'], "init_layers .* it must be null where init_from is null"),
        (["refiner.model.reset_head=true"], "reset_head is true; it must be false where init_from is null"),
        (['refiner.model.freeze=["*"]'], "refiner.model.freeze leaves nothing to train; name parts of the model"),
        (['refiner.model.freeze=["blokcs.0"]'], r"refiner.model.freeze: blokcs.0 names no parameter; names begin with"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_written(
    tmp_path: Path, settings: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=sentence) as refusal:
        prepare(load(None, [*settings, f"refiner.run.output={tmp_path}"]), 1)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())
