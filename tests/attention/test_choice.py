"""The backend of each kind of attention is the fastest of those that fit into memory, and nothing is run to find out
what fits."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, choice, dispatch
from refiner_ds.attention.choice import Candidate, Layer, Measured
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.cases import bottleneck, leaf, linear

GIB = 2**30


def layer(kind: str, images: int = 3, at_once: int = 1) -> Layer:
    q_BHNd, k_BHNd, v_BHNd = (leaf(1, 4, 9, 5).detach().float().requires_grad_() for _ in range(3))
    weights = {"map": None, "linear": linear(4, 2), "bottleneck": bottleneck(4, 2)}[kind]
    if weights is not None:
        weights = torch.utils._pytree.tree_map(_single, weights)
    return Layer(
        kind, DeferredMap(q_BHNd, k_BHNd, 0.4), v_BHNd, weights, 0.5, kind == "bottleneck", images, at_once, "map"
    )


def _single(x):
    double = isinstance(x, torch.Tensor) and x.dtype == torch.float64
    return x.detach().float().requires_grad_(x.requires_grad) if double else x


KINDS = ["map", "linear", "bottleneck"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_counted_bytes_are_those_that_are_saved(kind, backend):
    one = layer(kind)
    counted, working = choice.count(one, backend, one.images)

    def draw(x, images):
        drawn = torch.rand(x.shape if images is None else (images, *x.shape[1:])).to(x.dtype)
        return drawn.requires_grad_(x.requires_grad)

    forward, _, own = choice._call(one, attention.BACKENDS[backend], one.images, draw)
    holder = torch.nn.Module()
    for index, tensor in enumerate(own):
        holder.register_buffer(f"own{index}", tensor)
    assert counted == saved_bytes(forward, holder)
    assert working > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_is_timed_and_no_statistic_moves(kind):
    one = layer(kind)
    before = [x.clone() for x in torch.utils._pytree.tree_leaves(one.weights) if isinstance(x, torch.Tensor)]
    measured = choice.measure(one, 8 * GIB, seconds=0.0, kernels=False)
    assert [found.backend for found in measured.candidates] == ["tiled", "eager"]
    assert all(found.milliseconds and not found.reason for found in measured.candidates)
    after = [x for x in torch.utils._pytree.tree_leaves(one.weights) if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_does_not_fit_is_neither_timed_nor_chosen(monkeypatch):
    one = layer("bottleneck", at_once=12)
    needed = sum(n * m for n, m in zip(choice.count(one, "eager", one.images), (12, 1), strict=True))
    monkeypatch.setattr(choice, "_time", lambda *_: pytest.fail("nothing is left to compare"))
    measured = choice.measure(one, 4 * needed - 4, seconds=0.0, kernels=False)
    assert "more than a quarter of what is free" in measured.candidates[1].reason
    assert choice.best_of(measured) == "tiled"
    monkeypatch.setattr(choice, "_time", lambda layer, able, images, seconds: images)
    assert not choice.measure(one, 4 * needed, seconds=0.0, kernels=False).candidates[1].reason


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(attention.BACKENDS["eager"], "refine", fails, raising=False)
    monkeypatch.setattr(choice, "count", lambda *_, **__: (1, 1))
    measured = choice.measure(layer("linear"), GIB, seconds=0.0, kernels=False)
    assert measured.candidates[1].reason == "fails (RuntimeError)"
    assert choice.best_of(measured) == "tiled"


@pytest.mark.parametrize(
    ("tiled", "eager", "best"), [(1.0, 2.0, "tiled"), (1.02, 1.0, "tiled"), (1.03, 1.0, "eager"), (1.0, None, "tiled")]
)
def test_the_default_stays_unless_another_is_faster_by_more_than_two_percent(tiled, eager, best):
    found = [Candidate("tiled", milliseconds=tiled), Candidate("eager", milliseconds=eager)]
    assert choice.best_of(Measured("map", 1, found)) == best


def test_a_choice_holds_in_training_and_gives_way_to_whatever_is_asked_for(monkeypatch):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    attention.use_backends({"linear": "eager"})
    assert attention.resolve_backend(kind="linear") == "eager"
    assert attention.resolve_backend(kind="map") == attention.resolve_backend() == "tiled"
    assert attention.resolve_backend("tiled", kind="linear") == "tiled"
    with torch.inference_mode():
        assert attention.resolve_backend(kind="linear") == "tiled"
    with attention.attention_backend("tiled"):
        assert attention.resolve_backend(kind="linear") == "tiled"


def test_a_layer_too_small_to_time_is_eager_on_a_cpu_and_the_default_elsewhere(monkeypatch):
    one = layer("map")
    assert choice.by_rule(one, kernels=False) == "eager"
    there = one._replace(value_BHNd=one.value_BHNd.detach().to("meta"))
    monkeypatch.setattr(choice, "candidates", lambda layer, kernels: ["triton", "tiled"])
    assert choice.by_rule(there, kernels=True) == "triton"
