"""What timm asks of every model it lists (its tests/test_models.py), asked of ours.

Not asked, since it cannot hold: torch.jit.script (forward takes a box and returns a tensor or a tuple); features by FX
tracing (drop-path and mix-token branch on the mode; features_only uses forward_intermediates instead); a pool size and
reset_classifier(0, "") (these models read the class token and have no pooling to leave out); pretrained weights by
name (the authors published one file, for load_released_weights).
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, get_pretrained_cfg_value

import refiner_ds.models  # noqa: F401  registers the names
from tests.marks import long_where

NAMES = ["refined_vit", "refiner_vit_l", "refiner_vit_m", "refiner_vit_s"]


def create(name: str, **options):
    """The model by name, with four blocks where its depth does not matter."""
    return timm.create_model(name, **{"depth": 4, **options})


def inputs_of(model, batch: int = 1) -> torch.Tensor:
    cfg = model.default_cfg
    assert cfg["fixed_input_size"], "timm feeds other sizes to models that do not say so"
    return torch.randn(batch, *cfg["input_size"])


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_of_the_whole_model_is_finite(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        outputs = model(inputs_of(model))
    assert outputs.shape == (1, 1000) and outputs.isfinite().all()


@pytest.mark.parametrize("name", long_where(lambda name: name.endswith(("_m", "_l")), NAMES))
def test_every_parameter_gets_a_gradient(name):
    model = create(name, num_classes=42).train()
    outputs = model(inputs_of(model, batch=2))
    class_logits, patch_logits, _ = outputs
    torch.cat([class_logits, patch_logits.flatten(0, 1)]).mean().backward()
    assert class_logits.shape[-1] == patch_logits.shape[-1] == 42
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    alone = create(name, num_classes=42, return_dense=False, depth=2).train()
    alone(inputs_of(alone, batch=2)).mean().backward()  # as timm's own training loop would
    assert [key for key, parameter in alone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"return_dense": False}], ids=["dense", "class head"])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_is_true(name, options):
    model = create(name, depth=2, **options).eval()
    state, cfg, x = model.state_dict(), model.default_cfg, inputs_of(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[-1] == model.num_features
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        classifiers = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
        assert all(f"{layer}.weight" in state for layer in (*classifiers, cfg["first_conv"]))
        assert sorted(layer for layer in ("head", "aux_head") if hasattr(model, layer)) == sorted(classifiers)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
    assert get_pretrained_cfg_value(name, "input_size") == (3, 224, 224)
    assert timm.create_model(name, global_pool="token", depth=1).global_pool == "token"


@pytest.mark.parametrize("name", NAMES)
def test_features_are_extracted_by_the_getter(name):
    model = create(name, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    x = inputs_of(model)
    with torch.no_grad():
        outputs = model(x)
    assert len(channels) == len(outputs) >= 3
    for width, reduction, output in zip(channels, reductions, outputs, strict=True):
        assert output.shape == (1, width, *(math.ceil(side / reduction) for side in x.shape[-2:]))
        assert output.isfinite().all()


@pytest.mark.parametrize("name", long_where(lambda name: name.endswith(("_m", "_l")), NAMES))
def test_intermediates_are_those_of_the_forward_pass(name):
    model = create(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = inputs_of(model)
    with torch.no_grad():
        output, intermediates = model.forward_intermediates(x)
        assert len(info.channels()) == len(intermediates)
        for width, reduction, feature in zip(info.channels(), info.reduction(), intermediates, strict=True):
            assert feature.shape == (1, width, *(side // reduction for side in x.shape[-2:]))
        assert torch.allclose(output, model.forward_features(x), rtol=1e-4, atol=1e-5)
        model.set_grad_checkpointing(True)
        assert torch.allclose(output, model.forward_features(x), rtol=1e-4, atol=1e-5)
        model.prune_intermediate_layers([1])
        assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], intermediates[1])
