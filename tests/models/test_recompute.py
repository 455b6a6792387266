"""Recomputing activations changes nothing: loss, gradients and running statistics are the same to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from tests.models.small import RANDOM, RELEASED, VARIANTS, differences, small_model, training_step


def reentrant(function, *tensors):
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=True)


@pytest.mark.parametrize("checkpoint", [None, reentrant], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("unit", ["pair", "block", "refiner"])
@pytest.mark.parametrize("variant", ["released", "paper", "paper-bottleneck", "paper-no-reduction", "plain"])
def test_recomputation_is_bit_identical_with_dropout_and_drop_path(variant, unit, checkpoint):
    model = small_model(**VARIANTS[variant], **RANDOM)
    model.set_grad_checkpointing(unit=unit, checkpoint=checkpoint)
    assert differences(training_step(model), training_step(small_model(**VARIANTS[variant], **RANDOM))) == []


@pytest.mark.parametrize("unit", ["pair", "block"])
def test_recomputation_keeps_the_cos_reg_penalty(unit):
    model = small_model(**RELEASED, **RANDOM, cos_reg=0.1)
    model.set_grad_checkpointing(unit=unit)
    plain = training_step(small_model(**RELEASED, **RANDOM, cos_reg=0.1))
    recomputed = training_step(model)
    assert torch.equal(recomputed[0], plain[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_randomness_is_really_on_in_these_tests():
    model = small_model(**RELEASED, **RANDOM)
    again = small_model(**RELEASED, **RANDOM)
    assert "loss" in differences(training_step(model, seed=1), training_step(again, seed=2))


@pytest.mark.parametrize("unit", ["pair", "block", "refiner"])
def test_each_unit_keeps_fewer_bytes_for_backward(unit, monkeypatch):
    monkeypatch.setenv("REFINER_ATTENTION", "eager")  # tiled attention leaves little to save at this size

    def kept(**checkpointing) -> int:
        model = small_model(**RELEASED).train()
        if checkpointing:
            model.set_grad_checkpointing(**checkpointing)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(4, 3, 32, 32))
        return sum(sizes.values())

    assert kept(unit=unit) < 0.9 * kept()


def test_checkpointing_can_be_switched_off_and_evaluates_untouched():
    model = small_model(**RELEASED)
    calls = []

    def counting(function, *tensors):
        calls.append(len(tensors))
        return function(*tensors)

    model.set_grad_checkpointing(unit="pair", checkpoint=counting)
    model.eval()(torch.randn(2, 3, 32, 32))
    assert calls == []
    model.train()(torch.randn(2, 3, 32, 32))
    assert calls == [1, 2]  # the first pair gets x alone, the second x and the residual map
    model.set_grad_checkpointing(enable=False)
    model(torch.randn(2, 3, 32, 32))
    assert calls == [1, 2]


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match=r"^unit is 'layer'; it must be one of pair, block, refiner$"):
        small_model(**RELEASED).set_grad_checkpointing(unit="layer")
