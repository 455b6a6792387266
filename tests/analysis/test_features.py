"""Feature evolution looks at every block of any model timm knows, and is the CKA of whole feature sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import refiner_ds.models  # noqa: F401  registers the names
from refiner_ds.analysis.__main__ import main
from refiner_ds.analysis.cka import linear_cka
from refiner_ds.analysis.features import block_tokens, draw, feature_evolution
from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.map_statistics import token_similarity
from refiner_ds.data.augment import EvalSettings

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}


def loaded(name: str, **options: object) -> LoadedModel:
    model = timm.create_model(name, **options).eval()
    return LoadedModel(name, model, EvalSettings(32), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "name, options, blocks",
    [
        ("refined_vit", SMALL_VIT, 4),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}, 3),
        ("resnet10t", {}, 4),
        ("convnext_atto", {}, 12),
    ],
)
def test_every_block_is_compared_whatever_the_model(name: str, options: dict, blocks: int, tmp_path: Path) -> None:
    one, images = loaded(name, **options), torch.rand(12, 3, 32, 32)
    rows = feature_evolution(one, iter([(images[:7], torch.zeros(7)), (images[7:], torch.zeros(5))]))
    assert [row["block"] for row in rows] == list(range(blocks))
    assert rows[-1]["cka_last"] == pytest.approx(1) and rows[-1]["images"] == 12
    with torch.inference_mode():
        first, outputs = block_tokens(one.model, images)
    means = [output.mean(1) for output in outputs]
    assert rows[0]["cka_input"] == pytest.approx(linear_cka(means[0], first.mean(1)), abs=1e-6)
    assert rows[0]["cka_last"] == pytest.approx(linear_cka(means[0], means[-1]), abs=1e-6)
    for row, output in zip(rows, outputs, strict=True):
        assert row["token_similarity"] == pytest.approx(token_similarity(output), rel=1e-5) and output.shape[0] == 12
    draw(rows, tmp_path / "features.png")
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")


def test_class_tokens_are_no_patches() -> None:
    model = timm.create_model("refined_vit", **SMALL_VIT).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        _, outputs = block_tokens(model, images)
        last = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(outputs[-1], last)


def test_models_that_cannot_be_looked_into_are_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    no_checkpoint = tmp_path / "notes.pth"
    no_checkpoint.write_text("not weights")
    three, nothing = tmp_path / "three.pth", tmp_path / "nothing.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), three)
    torch.save({"other": torch.zeros(1)}, nothing)
    for arguments, said in (
        (["features", "timm:no_such_model"], "timm:no_such_model: timm knows no model of that name"),
        (["features", str(tmp_path / "nothing")], "nothing: does not exist"),
        (["features", "timm:resnet10t"], "give --data FOLDER"),
        (["features", f"timm:resnet10t={tmp_path / 'none.pth'}"], "none.pth: no such file"),
        (["features", f"timm:resnet10t={no_checkpoint}"], "notes.pth: cannot be loaded into resnet10t"),
        (
            ["features", f"timm:test_resnet={three}"],
            "into test_resnet: size mismatch for fc.weight: copying a param with",
        ),
        (["features", f"timm:test_resnet={nothing}"], "into test_resnet: Missing key(s) in state_dict: "),
        (["feature"], "feature is not a subcommand; did you mean features?"),
    ):
        assert main([*arguments, *(["--out", str(tmp_path / "out")] if len(arguments) > 1 else [])]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and len(error) < 1000
    assert not (tmp_path / "out").exists()
