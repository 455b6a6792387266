"""Released checkpoints load under their names, wrapped or not, at other sizes and classes; misfits are listed."""

from __future__ import annotations

import argparse
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv

import refiner_ds.models
from refiner_ds.models import load_released_weights
from tests.models import golden
from tests.models.small import RELEASED, small_model


def logits(model) -> torch.Tensor:
    return model.eval()(golden.tensor("input"))


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 299},
    "state_dict_ema": lambda state: {"state_dict_ema": state, "state_dict": {}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled blocks": lambda state: {
        re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in state.items()
    },
    "compiled in DDP in a loop": lambda state: {
        f"model.module._orig_mod.{name}": value for name, value in state.items()
    },
    "AveragedModel": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{name}": value for name, value in state.items()},
    },
    "DeepSpeed": lambda state: {"module": state, "ds_version": "0.19"},
    "numpy beside": lambda state: {"state_dict": state, "best": np.float64(83.6), "at": np.int64(7)},
    "numpy of every kind beside": lambda state: {
        "model_state_dict": state,
        "arrays": [np.ones(2, kind) for kind in ("i1", "u1", "i2", "u2", "u4", "u8", "f2", "?", "f4")],
        "name": np.str_("S"),
        "when": np.datetime64("2026-11-25"),
        "took": np.timedelta64(3, "s"),
        "small": np.uint8(3),
    },
    "counters as numbers": lambda state: {
        name: np.int64(value.item()) if name.endswith("tracked") else value for name, value in state.items()
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("source", ["dict", "file"])
def test_weights_load_with_and_without_the_usual_wrappings(tmp_path, wrapping, source):
    content = WRAPPINGS[wrapping](golden.section("state"))
    if source == "file":
        torch.save(content, tmp_path / "weights.pth")
        content = tmp_path / "weights.pth"
    model = golden.tiny_model()
    assert load_released_weights(model, content) == []
    assert golden.relative_error(logits(model), golden.tensor("eval_logits")) < 1e-4


def test_a_checkpoint_that_carries_its_command_line_loads(tmp_path):
    content = {"state_dict": golden.section("state"), "args": argparse.Namespace(lr=5e-4), "epoch": 299}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    model = golden.tiny_model()
    load_released_weights(model, tmp_path / "checkpoint.pth.tar")
    assert golden.relative_error(logits(model), golden.tensor("eval_logits")) < 1e-4


def test_timms_own_loading_takes_released_checkpoints(tmp_path):
    torch.save({"state_dict": golden.section("state")}, tmp_path / "weights.pth")
    model = golden.tiny_model(
        img_size=96, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    )
    assert torch.equal(model.pos_embed[:, 0], golden.tensor("state/pos_embed")[:, 0])
    assert torch.equal(model.aux_head.weight, golden.tensor("state/aux_head.weight"))


def test_weights_load_from_safetensors(tmp_path):
    safetensors.torch.save_file(golden.section("state"), tmp_path / "weights.safetensors")
    model = golden.tiny_model()
    load_released_weights(model, str(tmp_path / "weights.safetensors"))
    assert golden.relative_error(logits(model), golden.tensor("eval_logits")) < 1e-4


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path):
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"state_dict": Payload()}, file)
    with pytest.raises(ValueError, match=r"evil.pth cannot be read as weights"):
        load_released_weights(golden.tiny_model(), tmp_path / "evil.pth")


def test_a_checkpoint_fits_a_larger_picture_with_the_class_entry_kept():
    model = golden.tiny_model(img_size=96)
    with pytest.warns(UserWarning, match="position embedding resized from 16 patches to 6x6"):
        notes = load_released_weights(model, golden.section("state"))
    assert len(notes) == 1
    state = golden.section("state")
    assert model.pos_embed.shape == (1, 37, 48)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    resized, original = model.pos_embed[0, 1:].unflatten(0, (6, 6)), state["pos_embed"][0, 1:].unflatten(0, (4, 4))
    torch.testing.assert_close(resized.mean((0, 1)), original.mean((0, 1)), rtol=0, atol=0.005)
    assert (resized[:3, :3].mean((0, 1)) - original[:2, :2].mean((0, 1))).abs().max() < 0.01
    assert torch.equal(model.head.weight, state["head.weight"])


def test_a_224_checkpoint_loads_at_384_and_448():
    small = timm.create_model("refiner_vit_s", depth=2, num_classes=3)
    for size, patches in ((384, 24 * 24), (448, 28 * 28)):
        model = timm.create_model("refiner_vit_s", depth=2, num_classes=3, img_size=size)
        with pytest.warns(UserWarning, match="position embedding resized from 196 patches"):
            load_released_weights(model, small.state_dict())
        assert model.pos_embed.shape[1] == 1 + patches
        assert torch.equal(model.pos_embed[:, 0], small.pos_embed[:, 0])


def test_another_number_of_classes_keeps_fresh_heads_and_says_so_in_one_line():
    model = golden.tiny_model(num_classes=7)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if "head" in name}
    with pytest.warns(UserWarning, match="^heads start afresh: the checkpoint has 10 classes and the model 7$") as said:
        notes = load_released_weights(model, golden.section("state"))
    assert len(notes) == len(said) == 1
    assert all(torch.equal(model.state_dict()[name], value) for name, value in fresh.items())
    truth = golden.tensor("state/blocks.1.attn.DLA.conv_exp.weight")
    assert torch.equal(model.blocks[1].attn.DLA.conv_exp.weight, truth)


def test_everything_missing_and_left_over_is_listed_and_nothing_is_loaded():
    model, state = golden.tiny_model(), golden.section("state")
    before = model.pos_embed.clone()
    del state["blocks.1.attn.DLA.bn1.weight"], state["norm.bias"]
    state["blocks.9.mlp.fc1.weight"] = torch.zeros(1)
    state["blocks.0.attn.proj.weight"] = torch.zeros(3, 3)
    sentence = (
        "the state dict does not fit the model; 2 missing: blocks.1.attn.DLA.bn1.weight, norm.bias; "
        "1 left over: blocks.9.mlp.fc1.weight; "
        "1 of another shape: blocks.0.attn.proj.weight [3, 3] instead of [48, 48]"
    )
    with pytest.raises(ValueError) as refusal:
        load_released_weights(model, state)
    assert str(refusal.value) == sentence
    assert torch.equal(model.pos_embed, before)


def test_checkpoints_older_than_batch_counters_load():
    state = {name: value for name, value in golden.section("state").items() if "num_batches" not in name}
    model = golden.tiny_model()
    load_released_weights(model, state)
    assert golden.relative_error(logits(model), golden.tensor("eval_logits")) < 1e-4


def test_unreadable_files_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save([1, 2], tmp_path / "list.pth")
    refusals = {
        "absent.pth": "absent.pth does not exist; give a .safetensors, .pth or .tar file of weights",
        "cut.pth": "cut.pth cannot be read as weights",
        "list.pth": "list.pth holds a list; it should hold a dict of tensors",
    }
    for name, sentence in refusals.items():
        with pytest.raises(ValueError, match=sentence) as refusal:
            load_released_weights(golden.tiny_model(), tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_a_folder_is_named_as_one(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path} is a folder; give a file of weights"):
        load_released_weights(golden.tiny_model(), tmp_path)


def grid_model(size, **options):
    return small_model(img_size=size, **{**RELEASED, **options})


FORMATS = ["dict", "torch", "safetensors"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_grid_that_is_not_square_travels_with_the_weights(tmp_path, form):
    wide = grid_model((32, 128))  # 4x16 patches, as many as 8x8
    source = wide.state_dict()
    if form == "torch":
        torch.save(source, tmp_path / "wide.pth")
        source = tmp_path / "wide.pth"
    elif form == "safetensors":
        safetensors.torch.save_file(source, tmp_path / "wide.safetensors")
        source = tmp_path / "wide.safetensors"
    same = grid_model((32, 128), seed=1)
    assert load_released_weights(same, source) == []
    assert torch.equal(same.pos_embed, wide.pos_embed)
    for size, rows, columns in (((64, 64), 8, 8), ((128, 32), 16, 4)):
        model = grid_model(size, seed=1)
        with pytest.warns(UserWarning, match=f"^position embedding resized from 4x16 patches to {rows}x{columns}$"):
            load_released_weights(model, source)
        truth = resample_abs_pos_embed(wide.pos_embed.detach(), [rows, columns], [4, 16], num_prefix_tokens=1)
        assert torch.equal(model.pos_embed, truth)
        with pytest.raises(RuntimeError, match="pos_embed is of a 4x16 patch grid"):  # plain loading neither
            grid_model(size).load_state_dict(wide.state_dict(), strict=False)
    with pytest.raises(
        RuntimeError, match="pos_embed is of a 8x8 patch grid, the model's is 4x16; load_released_weights"
    ):
        grid_model((32, 128)).load_state_dict(grid_model((64, 64)).state_dict(), strict=False)
    assert not [name for name in grid_model((64, 64)).state_dict() if "grid" in name], "square models: released names"


def test_positions_of_an_unknown_grid_need_old_grid():
    state = grid_model((16, 64)).state_dict()
    del state["pos_embed_grid"]
    state["pos_embed"] = torch.randn(1, 1 + 18, 24)
    with pytest.raises(ValueError) as refusal:
        load_released_weights(grid_model(32), state)
    assert str(refusal.value) == (
        "the state dict: pos_embed holds 18 patches, which is no square grid;"
        " give old_grid=(rows, columns) of the images it was trained on"
    )
    with pytest.raises(ValueError, match=r"holds 18 patches, where old_grid \(4, 4\) has 16; give old_grid="):
        load_released_weights(grid_model(32), state, old_grid=(4, 4))
    model = grid_model(32)
    with pytest.warns(UserWarning, match="resized from 3x6 patches to 4x4"):
        load_released_weights(model, state, old_grid=(3, 6))
    truth = resample_abs_pos_embed(state["pos_embed"], [4, 4], [3, 6], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, truth)


def test_as_many_patches_as_the_models_that_may_be_square_need_old_grid():
    square = grid_model((32, 32)).state_dict()
    with pytest.raises(
        ValueError, match="pos_embed holds 16 patches, which may be 4x4 or the model's 2x8; give old_grid="
    ):
        load_released_weights(grid_model((16, 64)), square)
    same = grid_model((16, 64))
    assert load_released_weights(same, square, old_grid=(2, 8)) == []
    assert torch.equal(same.pos_embed, square["pos_embed"])
    with pytest.warns(UserWarning, match="resized from 16 patches to 2x8"):
        load_released_weights(grid_model((16, 64)), square, old_grid=[4, 4])


@pytest.mark.parametrize("old_grid", [(0, 0), (-4, -4), 16, "ab", (2,), (2, 8, 1), (2.0, 8.0), (True, 16)])
def test_what_is_no_grid_is_refused_as_old_grid(old_grid):
    with pytest.raises(
        ValueError, match=f"^the state dict: old_grid is {re.escape(repr(old_grid))}; it must be the rows"
    ):
        load_released_weights(grid_model(32), grid_model(32).state_dict(), old_grid=old_grid)


def test_a_grid_that_contradicts_the_checkpoint_is_refused():
    wide = grid_model((16, 64)).state_dict()
    with pytest.raises(
        ValueError, match=r"old_grid is \(8, 2\), but the checkpoint says that its patch grid is \(2, 8\)"
    ):
        load_released_weights(grid_model(32), wide, old_grid=(8, 2))
    with pytest.raises(ValueError, match=r"pos_embed_grid is \[3, 5\], but pos_embed holds 16 patches"):
        load_released_weights(grid_model(32), {**wide, "pos_embed_grid": torch.tensor([3, 5])})


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_is_adapted_to_the_models_channels_as_timm_does(channels):
    model = golden.tiny_model(in_chans=channels)
    with pytest.warns(UserWarning, match=f"^first convolution adapted from 3 to {channels} channels$"):
        load_released_weights(model, golden.section("state"))
    truth = adapt_input_conv(channels, golden.tensor("state/patch_embed.conv1.weight"))
    assert torch.equal(model.patch_embed.conv1.weight, truth)


def test_a_checkpoint_with_and_a_model_without_an_auxiliary_head_fit_each_other_with_a_word():
    alone = golden.tiny_model(return_dense=False)
    with pytest.warns(UserWarning, match="^auxiliary head left out: the model has none"):
        load_released_weights(alone, golden.section("state"))
    dense = golden.tiny_model()
    fresh = dense.aux_head.weight.clone()
    with pytest.warns(UserWarning, match="^auxiliary head starts afresh: the checkpoint has none"):
        load_released_weights(dense, alone.state_dict())
    assert torch.equal(dense.aux_head.weight, fresh) and torch.equal(dense.head.weight, alone.head.weight)


def test_heads_can_be_reset():
    model = golden.tiny_model()
    fresh = model.head.weight.clone()
    with pytest.warns(UserWarning, match="^heads start afresh, as asked$"):
        load_released_weights(model, golden.section("state"), reset_head=True)
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.norm.weight, golden.tensor("state/norm.weight"))


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match=r"^the state dict: epoch is a int, not a tensor; give a dict of weights$"):
        load_released_weights(golden.tiny_model(), {**golden.section("state"), "epoch": 3})
    with pytest.raises(ValueError, match="^weights are a RefinedViT; give the path of a file, or a dict of tensors$"):
        load_released_weights(golden.tiny_model(), golden.tiny_model())


def test_timms_checkpoint_filter_fits_a_checkpoint(tmp_path):
    state = refiner_ds.models.checkpoint_filter_fn(
        {"state_dict": golden.section("state")}, golden.tiny_model(img_size=96)
    )
    golden.tiny_model(img_size=96).load_state_dict(state)
    torch.save({"state_dict": golden.section("state")}, tmp_path / "weights.pth")
    model = golden.tiny_model(img_size=96)
    timm.models.load_checkpoint(model, str(tmp_path / "weights.pth"), filter_fn=refiner_ds.models.checkpoint_filter_fn)
    assert torch.equal(model.pos_embed, state["pos_embed"])
