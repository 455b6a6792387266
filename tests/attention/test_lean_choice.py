"""Lean is what is used wherever it knows the case, and everything else goes on working by the plain composition."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import LocalKernels, lean
from tests.attention.cases import SCALE, bottleneck, leaf, linear, maps, scores

KNOWN, UNKNOWN = True, False


def constrained(constraint: str):
    kernels = [leaf(6, 1, *shape) for shape in attention.kernel_shapes(constraint, 3).values()]
    return linear(3, 2)._replace(local=LocalKernels(tuple(kernels), constraint, (2, 4)))


def half_frozen():
    refiner = bottleneck(3, 2)
    return refiner._replace(norm2_E=refiner.norm2_E._replace(training=False))


@pytest.mark.parametrize(
    ("make", "with_gradients", "known"),
    [
        (lambda: bottleneck(3, 2), True, KNOWN),
        (lambda: bottleneck(3, 2, training=False), False, KNOWN),
        (lambda: bottleneck(3, 2, training=False), True, UNKNOWN),
        (half_frozen, True, UNKNOWN),
        (half_frozen, False, UNKNOWN),
        (lambda: attention.fold_refiner(bottleneck(3, 2, training=False), SCALE), False, KNOWN),
        (lambda: linear(3, 2), True, KNOWN),
        (lambda: constrained("spatial"), True, UNKNOWN),
        (lambda: constrained("row+col"), True, UNKNOWN),
    ],
)
def test_what_lean_knows_it_computes_and_what_not_is_composed(make, with_gradients, known):
    attn, value, refiner = maps(2, 3, 9), leaf(2, 3, 9, 5), make()
    with torch.set_grad_enabled(with_gradients):
        assert lean.knows(attn, value, refiner) is known
        ours, truth = (attention.refine(attn, value, refiner, SCALE, backend=backend) for backend in ("tiled", "eager"))
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    assert ours.requires_grad is with_gradients


def test_lean_is_the_default_and_the_environment_overrides(monkeypatch):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    assert attention.resolve_backend() == "tiled"
    monkeypatch.setenv("REFINER_ATTENTION", "eager")
    assert attention.resolve_backend() == "eager"
    assert attention.resolve_backend("tiled") == "tiled"


@pytest.mark.parametrize("save_for_backward", ["map", "activations"])
def test_what_is_kept_can_be_set_for_the_process(save_for_backward):
    attn, value, refiner = maps(2, 3, 9), leaf(2, 3, 9, 5), bottleneck(3, 2)
    attention.set_save_for_backward(save_for_backward)
    try:
        out = attention.refine(attn, value, refiner, SCALE)
    finally:
        attention.set_save_for_backward("auto")
    stack_sizes = [x.numel() for x in out.grad_fn.saved_tensors if x.numel() > attn.numel()]
    assert stack_sizes == ([2 * attn.numel()] if save_for_backward == "activations" else [])


def test_auto_keeps_stacks_while_a_64th_of_memory_holds_them(monkeypatch):
    attn = torch.empty(1, 4, 8, 8, dtype=torch.bfloat16)
    stacks_bytes = (4 + 12) * 8 * 8 * 2
    for memory, kept in ((64 * stacks_bytes, "activations"), (64 * stacks_bytes - 1, "map")):
        monkeypatch.setattr(lean, "_memory_bytes", lambda device, memory=memory: memory)
        assert lean.resolve_save_for_backward("auto", attn, expanded=12) == kept


def test_an_unknown_word_for_what_is_kept_is_refused():
    with pytest.raises(ValueError, match="^save_for_backward is 'half'; it must be one of auto, map, activations$"):
        attention.set_save_for_backward("half")
    with pytest.raises(ValueError, match="^save_for_backward is 'half'; it must be one of auto, map, activations$"):
        attention.refine(
            maps(1, 2, 5), leaf(1, 2, 5, 5), bottleneck(2, 2), SCALE, backend="tiled", save_for_backward="half"
        )


@pytest.mark.parametrize("make", [lambda: bottleneck(3, 2), lambda: linear(3, 2)])
def test_compilers_see_the_plain_composition(make):
    pair, value, refiner = scores(2, 3, 9), leaf(2, 3, 9, 5), make()
    known = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(value):
        known.append(lean.knows(pair, value, refiner))
        return attention.refine(pair, value, refiner, SCALE)

    torch._dynamo.reset()
    torch.testing.assert_close(compiled(value), attention.refine(pair, value, refiner, SCALE, backend="eager"))
    assert known == [False]
