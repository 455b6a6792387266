"""The backend "eager compiled" gives eager's numbers and statistics, inside a checkpoint too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds import attention
from refiner_ds.attention import BACKENDS, dispatch
from refiner_ds.attention.backends import eager_compiled
from tests.attention.cases import bottleneck, leaf, leaves, linear, maps, norms_of, scores


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler's graph is run as it is: all but inductor, which takes a CPU half a minute."""
    monkeypatch.setattr(eager_compiled, "COMPILER", "aot_eager")
    forget()
    yield
    forget()


def forget() -> None:
    eager_compiled._compiled.cache_clear()
    torch._dynamo.reset()


def refined(backend: str, recomputed: bool = False) -> list[Tensor]:
    """Output, gradients and running statistics of a bottleneck in training."""
    torch.manual_seed(0)
    map_BHNN, value_BHNd, weights = maps(2, 3, 7), leaf(2, 3, 7, 5), bottleneck(3, 2)

    def refine(map_BHNN: Tensor, value_BHNd: Tensor) -> Tensor:
        # The sine saves its input, so that a recomputation does not end inside the refiner.
        return attention.refine(map_BHNN, value_BHNd, weights, 0.5, backend).sin()

    if recomputed:
        out = checkpoint(attention.recompute_aware(refine), map_BHNN, value_BHNd, use_reentrant=False)
    else:
        out = refine(map_BHNN, value_BHNd)
    gradients = torch.autograd.grad(out.square().sum(), leaves(map_BHNN, value_BHNd, weights))
    norms = [x for norm in norms_of(weights) for x in (norm.running_mean, norm.running_var, norm.batches)]
    return [out.detach(), *gradients, *norms]


def same(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> bool:
    pairs = zip(ours, truth, strict=True)
    return all((a.double() - b.double()).norm() <= tolerance * (1 + b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_bottleneck_gives_eagers_numbers_and_counts_once_though_it_is_recomputed(recomputed, traced_only):
    assert same(refined("eager compiled", recomputed), refined("eager"), 1e-10)


def test_a_recomputation_compiles_nothing_anew(traced_only):
    torch._dynamo.utils.counters.clear()
    refined("eager compiled", recomputed=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_linear_refiner_and_a_map_give_eagers_numbers(traced_only):
    results = {}
    for backend in ("eager", "eager compiled"):
        torch.manual_seed(0)
        deferred, value_BHNd, weights = scores(2, 3, 7), leaf(2, 3, 7, 5), linear(3, 2)
        out_BHNd, map_BHNN = attention.attend(deferred, value_BHNd, maps(2, 3, 7), backend)
        refined_BHNd = attention.refine(deferred, value_BHNd, weights, 0.5, backend)
        wanted = leaves(deferred, value_BHNd, weights)
        total = out_BHNd.square().sum() + map_BHNN.square().sum() + refined_BHNd.square().sum()
        results[backend] = [out_BHNd.detach(), refined_BHNd.detach(), *torch.autograd.grad(total, wanted)]
    assert same(results["eager compiled"], results["eager"], 1e-10)


def test_evaluation_moves_no_statistic(traced_only):
    weights = bottleneck(3, 2, training=False)
    before = [x.clone() for norm in norms_of(weights) for x in (norm.running_mean, norm.running_var, norm.batches)]
    map_BHNN, value_BHNd = maps(2, 3, 7), leaf(2, 3, 7, 5)
    with torch.no_grad():
        ours, truth = (
            attention.refine(map_BHNN, value_BHNd, weights, 0.5, name) for name in ("eager compiled", "eager")
        )
    after = [x for norm in norms_of(weights) for x in (norm.running_mean, norm.running_var, norm.batches)]
    assert torch.allclose(ours, truth) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_inside_a_compiled_model_it_is_eager_and_compiled_with_what_is_around_it(monkeypatch):
    monkeypatch.setattr(BACKENDS["eager compiled"], "refine", None, raising=False)
    map_BHNN, value_BHNd, weights = maps(1, 2, 3), leaf(1, 2, 3, 4), linear(2, 1)
    whole = torch.compile(
        lambda value_BHNd: attention.refine(map_BHNN, value_BHNd, weights, 1.0, "eager compiled"), backend="aot_eager"
    )
    assert torch.allclose(whole(value_BHNd), attention.refine(map_BHNN, value_BHNd, weights, 1.0, "eager"))


def training_step(backend: str, checkpointing: str) -> dict[str, Tensor]:
    """A released model's weights, statistics and gradients after a step without an optimiser."""
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "stem_chs": (4, 4, 4), "embed_dim": 12, "num_heads": 3, "depth": 4}
    model = timm.create_model("refined_vit", layout="released", num_classes=5, **sizes).train()
    model.set_grad_checkpointing(unit=checkpointing)
    with attention.attention_backend(backend):
        out = model(torch.randn(2, 3, 24, 24), mix_box=(0, 0, 0, 0))
        (out[0].square().sum() + out[1].square().sum()).backward()
    gradients = {f"{name}.grad": x.grad for name, x in model.named_parameters() if "bn3.bias" not in name}
    return {**model.state_dict(), **gradients}


@pytest.mark.parametrize("checkpointing", ["pair", "refiner"])
def test_a_model_trains_as_with_eager_whatever_is_recomputed_and_has_the_same_checkpoint(checkpointing, traced_only):
    ours, truth = (training_step(backend, checkpointing) for backend in ("eager compiled", "eager"))
    assert ours.keys() == truth.keys()
    assert same(list(ours.values()), list(truth.values()), 1e-4)
    counts = [x for name, x in ours.items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.long
@pytest.mark.slow
def test_what_inductor_compiles_gives_eagers_numbers():
    assert same(refined("eager compiled", recomputed=True), refined("eager"), 1e-5)


def test_the_environment_may_ask_for_it_on_a_cpu(monkeypatch):
    monkeypatch.setenv("REFINER_ATTENTION", "eager compiled")
    assert attention.resolve_backend() == "eager compiled" and attention.compiles_eager()
    monkeypatch.delenv("REFINER_ATTENTION")
    monkeypatch.setattr(dispatch, "_chosen", {"map": "eager compiled"})
    assert attention.compiles_eager() and attention.resolve_backend(kind="map") == "eager compiled"
    assert BACKENDS["eager compiled"].runs_on(torch.device("cpu")) is None
