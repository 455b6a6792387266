"""Half precision: logits close to fp32, softmax and statistics in fp32, gradients finite."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from tests.models import golden
from tests.models.small import BOX, RELEASED, VARIANTS, pictures, small_model


def spread_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square error over root mean square value."""
    return ((ours.float() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_bf16_logits_are_within_2_percent_of_fp32(how):
    model, x = golden.golden_model().eval(), golden.tensor("input")
    truth = model(x)
    if how == "parameters":
        ours = model.bfloat16()(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(x)
    assert ours.dtype == torch.bfloat16
    assert spread_error(ours, truth) < 0.02


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_bf16_training_outputs_and_running_statistics_are_close_to_fp32(how):
    exact, half, x = golden.golden_model().train(), golden.golden_model().train(), golden.tensor("input")
    truth = exact(x)
    if how == "parameters":
        ours = half.bfloat16()(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = half(x)
    assert spread_error(ours[0], truth[0]) < 0.03
    assert spread_error(ours[1], truth[1]) < 0.03
    for (name, given), (_, expected) in zip(half.named_buffers(), exact.named_buffers(), strict=True):
        if "running" in name:
            assert given.dtype == torch.float32
            torch.testing.assert_close(given, expected, rtol=0.05, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_with_bf16_parameters_and_autocast(variant):
    for autocast in (False, True):
        model = small_model(**VARIANTS[variant])
        model = model if autocast else model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            class_logits, patch_logits, _ = model.train()(pictures(), BOX)
        (class_logits.float().square().mean() + patch_logits.float().square().mean()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_softmax_of_half_precision_scores_is_taken_in_fp32():
    """With 600 keys bf16 rows would miss one by several percent before they are stored."""
    q = torch.randn(1, 1, 600, 8).bfloat16()
    rows = attention.equations.attention_map(q, q, 0.1).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-5, atol=1e-5)


def test_a_model_cast_to_half_and_back_keeps_its_statistics_to_the_bit():
    model = small_model(**RELEASED)
    model.train()(pictures())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.half().float()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
