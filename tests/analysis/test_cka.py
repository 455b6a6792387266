"""Streamed CKA is the full computation's, and is a number whatever features are like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refiner_ds.analysis.cka import CKA, linear_cka


def full_cka(x: Tensor, y: Tensor) -> float:
    """From whole Gram matrices, as Song et al. (2012) write it down."""

    def hsic(k: Tensor, el: Tensor) -> Tensor:
        n, one = k.shape[0], torch.ones(k.shape[0], dtype=k.dtype)
        k, el = k - torch.diag(k.diagonal()), el - torch.diag(el.diagonal())
        inner = (k * el).sum() + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
        return (inner - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))

    k, el = x @ x.T, y @ y.T
    return float(hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt())


def streamed(x: Tensor, y: Tensor, sizes: list[int]) -> float:
    pair = CKA()
    for x_batch, y_batch in zip(x.split(sizes), y.split(sizes), strict=True):
        pair.update(x_batch, y_batch)
    return pair.similarity()


def some_features(mean: float = 0.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(100, 12, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(12, 7, dtype=torch.float64)) + 0.5 * torch.randn(100, 7, dtype=torch.float64)
    return mean + scale * x, mean + scale * y


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (1e4, 1.0), (0.0, 1e-6), (3.0, 1e5)])
def test_streamed_cka_is_that_of_the_whole_set_whatever_the_batches(mean: float, scale: float) -> None:
    x, y = some_features()
    expected = full_cka(x, y)
    shifted, others = mean + scale * x, mean + scale * y
    for sizes in ([100], [64, 36], [1] * 100, [3, 96, 1]):
        assert streamed(shifted, others, sizes) == pytest.approx(expected, abs=1e-6)


def test_cka_of_features_with_a_rotation_of_themselves_is_one() -> None:
    x, _ = some_features()
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-12)


def test_unrelated_features_are_similar_by_nothing_on_average() -> None:
    # The biased estimate of 20 samples of 50 features would say about 0.7.
    values = [linear_cka(torch.randn(20, 50), torch.randn(20, 50)) for _ in range(200)]
    assert abs(sum(values) / len(values)) < 0.05


@pytest.mark.parametrize("x", [torch.zeros(8, 3), torch.full((8, 3), 7.0), torch.zeros(8, 0)])
def test_features_that_do_not_vary_give_zero_and_not_nan(x: Tensor) -> None:
    assert linear_cka(x, torch.randn(8, 4)) == 0
    assert linear_cka(x, x) == 0


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"\[5, 2\] and \[4, 2\]"):
        CKA().update(torch.randn(5, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="not finite"):
        CKA().update(torch.tensor([[1.0], [float("nan")]]), torch.randn(2, 1))
