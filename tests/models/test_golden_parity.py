"""The released layout computes what the authors' code computes: outputs, loss, gradients, statistics, and its size."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.models import golden

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trained_once():
    model = golden.golden_model().train()
    class_logits, patch_logits, box = model(golden.tensor("input"))
    loss = golden.training_loss(class_logits, patch_logits)
    loss.backward()
    return model, class_logits, patch_logits, box, loss


def test_state_dict_names_and_shapes_are_the_released_ones():
    ours = {name: tuple(value.shape) for name, value in golden.tiny_model().state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in golden.section("state").items()}


def test_evaluation_logits_are_the_released_ones():
    logits = golden.golden_model().eval()(golden.tensor("input"))
    assert golden.relative_error(logits, golden.tensor("eval_logits")) < TOLERANCE


def test_training_outputs_and_loss_are_the_released_ones(trained_once):
    _, class_logits, patch_logits, box, loss = trained_once
    assert box == (0, 0, 0, 0)
    assert golden.relative_error(class_logits, golden.tensor("train_cls")) < TOLERANCE
    assert golden.relative_error(patch_logits, golden.tensor("train_aux")) < TOLERANCE
    assert golden.relative_error(loss, golden.tensor("train_loss")) < TOLERANCE


def test_every_gradient_is_the_released_one(trained_once):
    truth = golden.section("grad")
    ours = {name: parameter.grad for name, parameter in trained_once[0].named_parameters()}
    assert ours.keys() == truth.keys()
    # adapt_bn cancels the bias of bn3: its gradient is exactly zero, and what is computed is rounding.
    errors = {name: golden.relative_error(ours[name], truth[name]) for name in ours if not name.endswith("bn3.bias")}
    errors |= {"patch_embed.bn3.bias": golden.relative_error(*(g["patch_embed.bn3.bias"] for g in (ours, truth)))}
    assert {name: error for name, error in errors.items() if error >= TOLERANCE} == {}


def test_every_running_statistic_is_the_released_one(trained_once):
    truth = golden.section("buffer_after")
    ours = dict(trained_once[0].named_buffers())
    assert ours.keys() == truth.keys()
    errors = {name: golden.relative_error(ours[name], truth[name]) for name in truth}
    assert {name: error for name, error in errors.items() if error >= TOLERANCE} == {}


@pytest.mark.parametrize(
    ("name", "count"),
    [("refiner_vit_s", 25_408_656), ("refiner_vit_m", 55_450_932), ("refiner_vit_l", 81_150_192)],
)
def test_released_sizes_have_exactly_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
