"""Released checkpoints load under their names, wrapped or not, at other sizes and classes; misfits are listed."""

from __future__ import annotations

import argparse
import pickle

import pytest
import safetensors.torch
import timm
import torch

from refiner_ds.models import load_released_weights
from tests.models import golden


def logits(model) -> torch.Tensor:
    return model.eval()(golden.tensor("input"))


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 299},
    "state_dict_ema": lambda state: {"state_dict_ema": state, "state_dict": {}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
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
