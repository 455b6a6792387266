"""The requested backend computes what it supports; the rest goes to the next one, which is logged with the reason."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import BACKENDS, Case, LocalKernels, dispatch, refiners, saving
from refiner_ds.config import load
from refiner_ds.errors import ConfigError
from refiner_ds.training.build import choose_attention
from tests.attention.cases import SCALE, bottleneck, leaf, linear, maps, scores

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_requested_or_logged(monkeypatch):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "_fallbacks", {})


def constrained(constraint: str):
    kernels = [leaf(6, 1, *shape) for shape in attention.kernel_shapes(constraint, 3).values()]
    return linear(3, 2)._replace(local=LocalKernels(tuple(kernels), constraint, (2, 4)))


def half_frozen():
    weights = bottleneck(3, 2)
    return weights._replace(norm2_E=weights.norm2_E._replace(training=False))


SUPPORTED = None
MIXED = "some of its norms are in training mode and some are not"


@pytest.mark.parametrize(
    ("make", "with_gradients", "reason"),
    [
        (lambda: bottleneck(3, 2), True, SUPPORTED),
        (lambda: bottleneck(3, 2, training=False), False, SUPPORTED),
        (
            lambda: bottleneck(3, 2, training=False),
            True,
            "gradients through running statistics are implemented there alone",
        ),
        (half_frozen, True, MIXED),
        (half_frozen, False, MIXED),
        (lambda: attention.fold_refiner(bottleneck(3, 2, training=False), SCALE), False, SUPPORTED),
        (lambda: linear(3, 2), True, SUPPORTED),
        (lambda: constrained("spatial"), True, "constraint 'spatial' is implemented there alone"),
        (lambda: constrained("row+col"), True, "constraint 'row+col' is implemented there alone"),
    ],
)
def test_tiled_says_what_it_does_not_support_and_eager_computes_it(make, with_gradients, reason, caplog):
    attn, value, weights = maps(2, 3, 9), leaf(2, 3, 9, 5), make()
    with torch.set_grad_enabled(with_gradients), caplog.at_level(logging.INFO):
        assert BACKENDS["tiled"].supports(Case(attn, value, weights)) == reason
        ours, truth = (attention.refine(attn, value, weights, SCALE, backend=backend) for backend in ("tiled", "eager"))
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    assert ours.requires_grad is with_gradients
    kind = refiners.refiner_of(weights).name
    fallback = "" if reason is None else f" ({kind}: eager, because {reason})"
    assert caplog.messages == [f"attention: tiled{fallback}", "attention: eager"]


def test_the_log_line_gathers_every_kind_and_comes_once(caplog):
    attn, value = maps(2, 3, 9), leaf(2, 3, 9, 5)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention.attend(scores(2, 3, 9), value)
            attention.refine(attn, value, constrained("spatial"))
            attention.refine(attn, value, half_frozen(), SCALE)
    linear_line = "linear: eager, because constraint 'spatial' is implemented there alone"
    assert caplog.messages == [
        "attention: tiled",
        f"attention: tiled ({linear_line})",
        f"attention: tiled ({linear_line}; bottleneck: eager, because {MIXED})",
    ]


class UnknownWeights(NamedTuple):
    weight: Tensor


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_weights_of_an_unknown_kind_are_refused(backend):
    known = "LinearWeights, BottleneckWeights, FoldedWeights"
    with pytest.raises(TypeError, match=f"^no refiner has weights of type UnknownWeights; there are {known}$"):
        attention.refine(maps(1, 2, 5), leaf(1, 2, 5, 5), UnknownWeights(leaf(2, 2)), backend=backend)


@pytest.mark.parametrize("row", refiners.REFINERS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_every_module_that_a_row_names_implements_its_refiner(row, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    module = import_module(getattr(row, backend))
    assert callable(module.supports) and callable(module.refine)


def test_tiled_is_the_default_on_cpu_and_the_environment_overrides_it(monkeypatch):
    assert attention.resolve_backend() == "tiled"
    monkeypatch.setenv("REFINER_ATTENTION", "eager")
    assert attention.resolve_backend() == "eager"
    assert attention.resolve_backend("tiled") == "tiled"


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("REFINER_ATTENTION", "quick")
    known = "eager, tiled, triton, eager compiled"
    with pytest.raises(ValueError, match=f"^REFINER_ATTENTION is 'quick'; it must be one of {known}$"):
        attention.refine(maps(1, 2, 5), leaf(1, 2, 5, 5), linear(2, 2))


def test_a_backend_that_the_device_cannot_run_is_refused_before_anything_starts(monkeypatch, tmp_path):
    launch = pytest.importorskip("refiner_ds.attention.kernels.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    refusal = "^REFINER_ATTENTION is 'triton', but kernels need a GPU, not cpu; take tiled or eager$"
    with pytest.raises(ValueError, match=refusal):
        attention.resolve_backend("triton", CPU)
    run = load(None, [f"refiner.run.output={tmp_path}", "refiner.model.attention=triton"])
    monkeypatch.setenv("REFINER_ATTENTION", "tiled")
    choose_attention(run, CPU)  # the environment has the last word
    monkeypatch.setenv("REFINER_ATTENTION", "triton")
    with pytest.raises(ConfigError, match=refusal):
        choose_attention(run, CPU)


def test_a_forced_backend_holds_inside_the_context_and_not_after():
    with attention.attention_backend("eager"):
        assert attention.resolve_backend() == "eager"
        with attention.attention_backend("tiled"):
            assert attention.resolve_backend() == "tiled"
        assert attention.resolve_backend() == "eager"
    assert attention.resolve_backend() == "tiled"


@pytest.mark.parametrize("save_for_backward", ["map", "activations"])
def test_what_is_saved_for_backward_can_be_set_for_the_process(save_for_backward):
    attn, value, weights = maps(2, 3, 9), leaf(2, 3, 9, 5), bottleneck(3, 2)
    attention.set_save_for_backward(save_for_backward)
    try:
        out = attention.refine(attn, value, weights, SCALE)
    finally:
        attention.set_save_for_backward("auto")
    sizes = [x.numel() for x in out.grad_fn.saved_tensors if x is not None and x.numel() > attn.numel()]
    assert sizes == ([2 * attn.numel()] if save_for_backward == "activations" else [])


def test_auto_saves_activations_while_a_64th_of_memory_holds_them(monkeypatch):
    attn = torch.empty(1, 4, 8, 8, dtype=torch.bfloat16)
    activations_bytes = (4 + 12) * 8 * 8 * 2
    for memory, saved in ((64 * activations_bytes, "activations"), (64 * activations_bytes - 1, "map")):
        monkeypatch.setattr(saving, "_memory_bytes", lambda device, memory=memory: memory)
        assert saving.resolve_save_for_backward("auto", attn, expanded=12) == saved


def test_an_unknown_word_for_what_is_saved_is_refused():
    refusal = "^save_for_backward is 'half'; it must be one of auto, map, activations$"
    with pytest.raises(ValueError, match=refusal):
        attention.set_save_for_backward("half")
    for backend in ("tiled", "eager"):
        with pytest.raises(ValueError, match=refusal):
            attention.refine(
                maps(1, 2, 5), leaf(1, 2, 5, 5), bottleneck(2, 2), backend=backend, save_for_backward="half"
            )


def test_what_is_compiled_for_one_backend_does_not_compute_for_another(monkeypatch):
    """Models of one shape share what one of them compiled."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    pair, value = scores(2, 3, 9), leaf(2, 3, 9, 5)
    graphs: list[bool] = []

    def noting(graph, inputs):
        graphs.append("refiner_ds" in str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    weights = linear(3, 2)

    def refined(value):
        return attention.refine(pair, value, weights, SCALE)

    compiled = torch.compile(refined, backend=noting, fullgraph=True)
    for backend, found in (("eager", [False]), ("tiled", [False, True]), ("eager", [False, True])):
        with attention.attention_backend(backend):
            compiled(value)
        assert graphs == found
    attention.use_backends({"linear": "eager"})
    compiled(value)
    attention.use_backends({"linear": "tiled"})
    compiled(value)
    assert graphs == [False, True, False, True]


@pytest.mark.parametrize("make", [lambda: bottleneck(3, 2), lambda: linear(3, 2)])
@pytest.mark.parametrize(("backend", "opaque"), [("eager", False), ("tiled", True)])
def test_compilers_see_operators_unless_eager_is_requested(make, backend, opaque):
    pair, value, weights = scores(2, 3, 9), leaf(2, 3, 9, 5), make()
    graphs = []

    def noting(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    @torch.compile(backend=noting, fullgraph=True)
    def compiled(value):
        return attention.refine(pair, value, weights, SCALE, backend=backend)

    torch._dynamo.reset()
    torch.testing.assert_close(compiled(value), attention.refine(pair, value, weights, SCALE, backend="eager"))
    assert len(graphs) == 1 and ("refiner_ds" in graphs[0]) is opaque
