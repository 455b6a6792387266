"""An MLP that keeps its input and one hidden layer computes what the plain composition does, its norm included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refiner_ds.benchmark.measure import saved_bytes
from refiner_ds.models.blocks import ScaledMlp

WIDTH, HIDDEN = 6, 10


def norm_of(width: int) -> nn.LayerNorm:
    """A norm whose gain and shift matter."""
    norm = nn.LayerNorm(width, eps=0.1)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


def composed(mlp: ScaledMlp, norm: nn.LayerNorm, x):
    out = mlp.fc2(F.gelu(mlp.fc1(norm(x))))
    return out if mlp.scale_channel is None else out * mlp.scale_channel


@pytest.mark.parametrize("init_values", [None, 0.3, 0.0])
def test_values_and_gradients_equal_the_plain_composition(init_values):
    mlp, norm = ScaledMlp(WIDTH, HIDDEN, init_values=init_values).double(), norm_of(WIDTH).double()
    x = torch.randn(2, 5, WIDTH).double()
    inputs = [x.requires_grad_(), *norm.parameters(), *mlp.parameters()]
    direction = torch.randn(2, 5, WIDTH).double()
    ours, truth = mlp(x, norm), composed(mlp, norm, x)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad(out, inputs, direction) for out in (ours, truth))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision_has_the_same_dtypes_and_errors_as_the_plain_composition(how):
    mlp, norm, x = ScaledMlp(64, 192, init_values=0.3), norm_of(64), torch.randn(4, 50, 64)
    both = nn.ModuleList((mlp, norm))
    exact = torch.autograd.grad(composed(mlp, norm, x).square().sum(), list(both.parameters()))
    if how == "parameters":
        both, x = both.bfloat16(), x.bfloat16()
    errors = []
    for compute in (lambda: mlp(x, norm), lambda: composed(mlp, norm, x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = compute()
        gradients = torch.autograd.grad(out.float().square().sum(), list(both.parameters()))
        assert [gradient.dtype for gradient in gradients] == [parameter.dtype for parameter in both.parameters()]
        errors.append((out.dtype, [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, exact, strict=True)]))
    assert errors[0][0] == errors[1][0]
    assert all(ours < 1.3 * theirs + 1e-4 for ours, theirs in zip(errors[0][1], errors[1][1], strict=True)), errors


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_second_derivatives_are_right(init_values):
    mlp, norm = ScaledMlp(3, 4, init_values=init_values).double(), norm_of(3).double()
    assert torch.autograd.gradgradcheck(lambda x, *_: mlp(x, norm), [torch.randn(2, 3).double().requires_grad_()])
    x = torch.randn(2, 3).double().requires_grad_()
    inputs = [x, *norm.parameters(), *mlp.parameters()]
    seconds = []
    for out in (mlp(x, norm), composed(mlp, norm, x)):
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in first), inputs))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_only_input_and_hidden_layer_are_kept():
    mlp, norm, x = ScaledMlp(WIDTH, HIDDEN), norm_of(WIDTH), torch.randn(2, 5, WIDTH, requires_grad=True)
    assert saved_bytes(lambda: mlp(x, norm), nn.ModuleList((mlp, norm))) == 4 * (2 * 5 * WIDTH + 2 * 5 * HIDDEN)


def test_dropout_still_drops():
    mlp, norm, x = ScaledMlp(WIDTH, HIDDEN, drop=0.5, init_values=None), norm_of(WIDTH), torch.randn(8, 50, WIDTH)
    assert 0.4 < (mlp.train()(x, norm) == 0).float().mean() < 0.6
    torch.testing.assert_close(mlp.eval()(x, norm), composed(mlp, norm, x))
