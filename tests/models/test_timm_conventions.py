"""timm's own tools work on these models: creation, features, heads, layer decay, input sizes."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

from tests.models.small import RELEASED, VARIANTS, pictures, small_model

NAMES = ["refined_vit", "refiner_vit_l", "refiner_vit_m", "refiner_vit_s"]


def test_the_models_are_registered():
    assert [name for name in timm.list_models("refine*") if name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_default_configurations_say_how_pictures_are_prepared(name):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=384)
    config = resolve_model_data_config(model)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == {"refiner_vit_l": 1.13, "refiner_vit_m": 1.0}.get(name, 0.9)
    assert model.patch_grid == (24, 24)
    assert dict(model.named_modules())[model.default_cfg["first_conv"]] is model.patch_embed.conv1
    assert all(hasattr(model, head) for head in model.default_cfg["classifier"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_intermediate_features_are_the_streams_behind_blocks(variant):
    model = small_model(**VARIANTS[variant]).eval()
    final, features = model.forward_intermediates(pictures(), indices=[0, 3], norm=True)
    assert [tuple(feature.shape) for feature in features] == [(4, 24, 4, 4)] * 2
    tokens = model.forward_features(pictures())
    assert torch.equal(final, tokens)
    assert torch.equal(features[-1].flatten(2).mT, tokens[:, 1:])
    (pair,) = model.forward_intermediates(
        pictures(), indices=1, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(pair[0], tokens[:, 1:]) and torch.equal(pair[1], tokens[:, :1])
    early = model.forward_intermediates(pictures(), indices=[1], stop_early=True, intermediates_only=True)
    assert len(early) == 1
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'; it must be NCHW or NLC"):
        model.forward_intermediates(pictures(), output_fmt="NHWC")


def test_features_only_wraps_the_model():
    model = timm.create_model("refiner_vit_s", features_only=True, img_size=32, depth=4, out_indices=(1, 3))
    assert model.feature_info.channels() == [384, 384] and model.feature_info.reduction() == [16, 16]
    assert [tuple(feature.shape) for feature in model(pictures())] == [(4, 384, 2, 2)] * 2


def test_layers_behind_the_last_feature_can_be_pruned():
    model = small_model(**RELEASED).eval()
    features = model.forward_intermediates(pictures(), indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2 and isinstance(model.head, torch.nn.Identity)
    assert torch.equal(model.forward_intermediates(pictures(), indices=[1], intermediates_only=True)[0], features)


def test_heads_can_be_replaced_and_taken_away():
    model = small_model(**RELEASED)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    class_logits, patch_logits, _ = model.train()(pictures())
    assert class_logits.shape == (4, 3) and patch_logits.shape == (4, 16, 3)
    assert model.num_classes == 3 and 0.01 < model.head.weight.std() < 0.03 and not model.aux_head.bias.any()
    model.reset_classifier(0)
    assert model.eval()(pictures()).shape == (4, 24)
    assert timm.create_model("refiner_vit_s", num_classes=0, depth=2, img_size=32).eval()(pictures()).shape == (4, 384)
    with pytest.raises(ValueError, match="global_pool is 'avg'"):
        model.reset_classifier(3, global_pool="avg")


def test_pre_logits_are_the_class_token():
    model = small_model(**RELEASED).eval()
    tokens = model.forward_features(pictures())
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])


def test_layer_decay_puts_every_parameter_in_its_layer():
    model = small_model(**RELEASED)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    # stem, four blocks, then norm and heads: each half the learning rate of the next
    order = ["patch_embed.conv1.weight", *(f"blocks.{index}.mlp.fc1.weight" for index in range(4)), "head.weight"]
    assert [by_name[name] for name in order] == [0.5**power for power in (5, 4, 3, 2, 1, 0)]
    assert by_name["pos_embed"] == by_name["patch_embed.conv1.weight"]


def test_weight_decay_spares_tokens_gains_and_biases():
    model = small_model(**RELEASED)
    groups = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) != spared, name
    assert create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups


def test_input_size_can_be_changed_after_creation():
    model = small_model(**VARIANTS["paper-spatial"]).eval()
    class_entry = model.pos_embed[:, 0].clone()
    model.set_input_size((48, 64))
    assert model.patch_grid == (6, 8) and model.pos_embed.shape == (1, 49, 24)
    assert torch.equal(model.pos_embed[:, 0], class_entry)
    fresh = small_model(**VARIANTS["paper-spatial"], seed=1, img_size=(48, 64)).eval()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(model(x), fresh(x))
    model.set_input_size(32)
    assert model.state_dict().keys() == small_model(**VARIANTS["paper-spatial"]).state_dict().keys()


def test_patch_size_can_be_changed_after_creation_and_frozen_weights_stay_frozen():
    model = small_model(**RELEASED).eval()
    model.pos_embed.requires_grad_(False)
    model.patch_embed.proj.weight.requires_grad_(False)
    model.set_input_size(patch_size=4)
    assert model.patch_size == 4 and model.patch_grid == (8, 8)
    assert model.feature_info[0]["reduction"] == 4
    assert not model.pos_embed.requires_grad and not model.patch_embed.proj.weight.requires_grad
    assert model.patch_embed.proj.bias.requires_grad
    assert model(pictures()).isfinite().all()
    model.set_input_size(img_size=(48, 64), patch_size=(8, 8))
    assert model.patch_grid == (6, 8) and not model.pos_embed.requires_grad
    with pytest.raises(ValueError, match=r"^patch_size is \(8, 4\); patches are square here"):
        model.set_input_size(patch_size=(8, 4))
    with pytest.raises(ValueError, match="img_size 50x64 is not a multiple of patch_size 8"):
        model.set_input_size((50, 64))


def test_sizes_of_a_configuration_overlay_and_of_the_model_agree():
    with torch.device("meta"):
        by_overlay = timm.create_model("refiner_vit_s", pretrained_cfg_overlay={"input_size": (3, 384, 384)})
        by_size = timm.create_model("refiner_vit_s", img_size=384)
        grey = timm.create_model("refiner_vit_s", pretrained_cfg_overlay={"input_size": (1, 224, 224)})
    assert by_overlay.patch_grid == by_size.patch_grid == (24, 24)
    assert resolve_model_data_config(by_overlay)["input_size"] == (3, 384, 384)
    for model in (by_overlay, by_size):
        assert get_model_input_config(model)["input_size"] == (3, 384, 384)
        assert get_model_input_config(model)["fixed_input_size"]
    by_size.set_input_size(448)
    assert get_model_input_config(by_size)["input_size"] == (3, 448, 448)
    assert grey.in_chans == 1 and grey.patch_embed.conv1.weight.shape[1] == 1


def test_other_channels_are_taken():
    assert small_model(**RELEASED, in_chans=1).eval()(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_initialisation_is_the_released_one():
    model = timm.create_model("refiner_vit_s", depth=2)
    for name, value in model.named_parameters():
        linear = any(part in name for part in ("qkv", "attn.proj", "fc1", "fc2", "head"))
        if name in ("cls_token", "pos_embed") or (linear and name.endswith("weight")):
            assert value.std().item() == pytest.approx(0.02, rel=0.15) and value.abs().max() < 2, name
        elif linear:
            assert not value.any(), name
    assert torch.equal(model.blocks[0].mlp.scale_channel, torch.full((384,), 1e-5))
    assert model.patch_embed.conv1.weight.std().item() == pytest.approx((1 / (3 * 147)) ** 0.5, rel=0.1)
    depthwise = model.blocks[1].attn.DLA.depth_sep_conv.weight
    assert depthwise.std().item() == pytest.approx((1 / 27) ** 0.5, rel=0.2)  # PyTorch's own for a fan-in of 9


def test_frozen_layers_get_no_gradient_and_their_batch_norms_keep_their_statistics():
    model = small_model(**RELEASED)
    frozen = model.freeze(["patch_embed", "blocks.[01]", "pos_embed"])
    assert "pos_embed" in frozen and "blocks.1.attn.DLA.bn1.weight" in frozen and "blocks.2.norm1.weight" not in frozen
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    class_logits, patch_logits, _ = model.train()(pictures())
    (class_logits.mean() + patch_logits.mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("blocks.3")}
    model.prune_intermediate_layers([0])
    assert not model.train().patch_embed.bn1.training
    with pytest.raises(ValueError, match="^blocks.7 names no parameter; names begin with"):
        model.freeze(["blocks.7"])
