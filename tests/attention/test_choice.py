"""The backend of each kind of attention is the fastest of those that fit into memory, and nothing is run to find out
what fits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, choice, dispatch
from refiner_ds.attention.backends import eager_compiled
from refiner_ds.attention.choice import Candidate, Layer, Measured
from refiner_ds.attention.kernels import configurations
from refiner_ds.attention.timing import OutOfTime, limited
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


@pytest.fixture
def compiled_by(monkeypatch):
    """Have "eager compiled" offered, as on a GPU, and compiled by somebody else than inductor."""

    def offer(compiler: str | Callable) -> None:
        monkeypatch.setattr(eager_compiled, "COMPILER", compiler)
        monkeypatch.setattr(choice, "candidates", lambda layer, kernels: ["tiled", "eager", "eager compiled"])

    yield offer
    eager_compiled._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["linear", "bottleneck"])
def test_what_is_compiled_is_timed_with_the_bytes_it_really_saves_and_how_long_compiling_took(kind, compiled_by):
    compiled_by("aot_eager")
    _, eager, compiled = choice.measure(layer(kind), 8 * GIB, seconds=0.0, kernels=False).candidates
    assert compiled.milliseconds and compiled.compiling and not compiled.reason
    assert eager.compiling is None and 0 < compiled.saved < 1.1 * eager.saved  # and copies of statistics
    assert compiled.saved + compiled.working >= eager.saved + eager.working


def test_on_a_cpu_nothing_is_compiled_when_a_run_begins():
    assert "eager compiled" not in choice.candidates(layer("map"), kernels=False)
    there = layer("map")
    there = there._replace(value_BHNd=Elsewhere(there.value_BHNd))
    assert choice.candidates(there, kernels=False)[-1] == "eager compiled"


class Elsewhere:
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda")

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __getattr__(self, name: str):
        return getattr(self.x, name)

    def __len__(self) -> int:
        return len(self.x)


def test_a_compiler_that_fails_is_a_reason_and_no_error(compiled_by):
    def fails(*_):
        raise RuntimeError("no C++ compiler")

    compiled_by(fails)
    measured = choice.measure(layer("linear"), 8 * GIB, seconds=0.0, kernels=False)
    assert measured.candidates[2].reason.startswith("fails (") and measured.candidates[2].milliseconds is None
    assert choice.best_of(measured) in ("tiled", "eager")


def test_compiling_ends_when_its_time_is_over(compiled_by, monkeypatch):
    def dawdles(*given):
        for _step in range(1000):
            time.sleep(0.02)

    compiled_by(dawdles)
    monkeypatch.setattr(choice, "COMPILE_SECONDS", 1.0)
    measured = choice.measure(layer("linear"), 8 * GIB, seconds=0.0, kernels=False)
    assert measured.candidates[2].reason == "fails (not compiled within 1 s)"


def test_a_limit_within_another_leaves_the_outer_one_in_place():
    with pytest.raises(OutOfTime), limited(0.2):
        with limited(60.0):
            pass
        for _ in range(100):
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("fastest", "reason"), [("triton", ""), ("eager", "not timed, since triton is not the fastest")]
)
def test_configurations_are_timed_only_where_triton_is_the_fastest_backend(fastest, reason, monkeypatch):
    monkeypatch.setitem(configurations.CONFIGURATIONS, "map", {"small": {}})
    names, asked = ["triton", "eager", "triton[small]"], []
    monkeypatch.setattr(choice, "candidates", lambda layer, kernels: names)
    monkeypatch.setattr(choice, "count", lambda *_, **__: (1, 1))
    seconds = dict.fromkeys(names, 0.02) | {fastest: 0.0}

    def step(layer, name, images):
        return lambda: (asked.append(name), time.sleep(seconds[name]))

    monkeypatch.setattr(choice, "_step", step)
    monkeypatch.setattr(choice, "clock_of", lambda device: time.perf_counter)
    measured = choice.measure(layer("map"), GIB, seconds=10.0, kernels=True)
    assert measured.candidates[2].reason == reason and ("triton[small]" in asked) == (not reason)
    assert choice.best_of(measured) == fastest


def test_a_configuration_is_in_use_forward_and_backward_of_its_own_timing_alone(monkeypatch):
    monkeypatch.setitem(configurations.CONFIGURATIONS, "map", {"small": {}})
    used = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            used.append(configurations.in_use("map"))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            used.append(configurations.in_use("map"))
            return grad

    monkeypatch.setattr(
        attention.BACKENDS["triton"], "attend", lambda deferred, v, residual: (Noting.apply(v),), raising=False
    )
    monkeypatch.setattr(
        attention.BACKENDS["triton"], "make_map", lambda deferred: torch.zeros(1, 4, 9, 9), raising=False
    )
    choice._step(layer("map"), "triton[small]", 1)()
    assert used == ["small", "small"] and configurations.in_use("map") == ""
    choice._step(layer("map"), "triton", 1)()
    assert used[2:] == ["", ""]


def test_a_choice_of_a_configuration_sets_it_and_another_choice_takes_it_back(monkeypatch):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "map", {"small": {"kernel": {"ROWS": 2}}})
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch.TRITON, "runs_on", lambda device: None, raising=False)
    attention.use_backends({"map": "triton[small]", "linear": "tiled"})
    assert attention.resolve_backend(kind="map") == "triton"
    assert configurations.sizes_of("kernel", None, ROWS=4, KEYS=8) == {"ROWS": 2, "KEYS": 8}
    assert attention.choose_backend(layer("map").case, torch.device("cpu"))[0] == "triton[small]"
    with pytest.raises(ValueError, match="map has no configuration 'large'; it has small"):
        attention.use_backends({"map": "triton[large]"})
    attention.use_backends({})
    assert configurations.sizes_of("kernel", None, ROWS=4, KEYS=8) == {"ROWS": 4, "KEYS": 8}
