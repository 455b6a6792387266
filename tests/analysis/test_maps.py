"""Numbers of maps before and after refining are means over images, and what cannot be looked at is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.map_statistics import head_similarity
from refiner_ds.analysis.maps import _refuse_missing, draw_maps, draw_numbers, map_rows
from refiner_ds.analysis.vit_maps import attention_maps, patch_grid, refuse_without_maps
from refiner_ds.data.augment import EvalSettings
from refiner_ds.errors import ConfigError
from tests.models.small import VARIANTS, pictures, small_model


def loaded(variant: str) -> LoadedModel:
    return LoadedModel(variant, small_model(**VARIANTS[variant]).eval(), EvalSettings(32), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("variant", ["released", "paper-no-reduction", "plain"])
def test_numbers_are_means_over_images_before_and_after_refining(variant: str, tmp_path: Path) -> None:
    one, images = loaded(variant), pictures(6)
    whole = map_rows(one, iter([(images, torch.zeros(6))]))
    batched = map_rows(one, iter([(images[:2], torch.zeros(2)), (images[2:], torch.zeros(4))]))
    assert [(row["block"], row["stage"]) for row in whole[:4]] == [
        (0, "before"), (0, "after"), (1, "before"), (1, "after")
    ]  # fmt: skip
    for row, other in zip(whole, batched, strict=True):
        assert row["images"] == other["images"] == 6
        for key in ("head_similarity", "entropy", "distance", "token_similarity"):
            assert row[key] == pytest.approx(other[key], rel=1e-5)
    last = one.model.attention_maps(images)[3]
    assert whole[-1]["head_similarity"] == pytest.approx(head_similarity(last))
    draw_numbers(whole, tmp_path / "maps.png")
    draw_maps(one, images[:2], tmp_path / "pictures.png", [0, 3], [0, 1])
    draw_maps(one, images[:1], tmp_path / "last.png", None, None)
    assert (tmp_path / "pictures.png").stat().st_size > (tmp_path / "last.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timms_vits_are_looked_into_as_they_compute(name: str, tmp_path: Path) -> None:
    """Their maps times their values are what their attention puts out, and nothing about them is changed."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    one, images = LoadedModel(name, model, EvalSettings(32), (0.5,) * 3, (0.5,) * 3), pictures(3)
    before, prefix, fused = model(images), model.num_prefix_tokens, model.blocks[0].attn.fused_attn
    taken: list[torch.Tensor] = []
    attn = model.blocks[1].attn
    hook = attn.qkv.register_forward_hook(lambda module, args, out: taken.append(out))
    maps = attention_maps(model, images, refined=True)
    hook.remove()
    query, key, _ = taken[0].unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    whole = (query @ key.mT / 12**0.5).softmax(-1)
    kept = [0, *range(prefix, whole.shape[-1])]
    torch.testing.assert_close(maps[1], whole[:, :, kept][..., kept])
    assert maps[0].shape == (3, 2, 17, 17) and patch_grid(model) == (4, 4)
    assert torch.equal(model(images), before) and attn.fused_attn == fused and not attn.attn_drop._forward_hooks
    rows = map_rows(one, iter([(images, torch.zeros(3))]))
    assert [row["head_similarity"] for row in rows[::2]] == [row["head_similarity"] for row in rows[1::2]]
    draw_maps(one, images[:1], tmp_path / "maps.png", None, None)


def test_models_without_maps_are_named() -> None:
    for name in ("test_resnet", "test_vit"):
        model = timm.create_model(name)
        if name == "test_vit":
            model.num_prefix_tokens = 0  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="x: its attention maps cannot be read"):
            refuse_without_maps("x", model)


def test_blocks_heads_and_images_that_do_not_exist_are_named() -> None:
    asked = {"blocks": None, "heads": None, "show": [0]}
    for change, said in (
        ({"blocks": [1, 4]}, "--blocks 4"),
        ({"heads": [2]}, "--heads 2"),
        ({"show": [-1]}, "--show -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            _refuse_missing(loaded("released"), SimpleNamespace(**{**asked, **change}))  # type: ignore[arg-type]
