"""Tile configurations change how a kernel computes, not what: every one gives eager's numbers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, choice
from refiner_ds.attention.bottleneck import triton_backward_local, triton_forward, triton_inference
from refiner_ds.attention.kernels import configurations, launch
from refiner_ds.attention.kernels.configurations import CARDS, CONFIGURATIONS
from refiner_ds.attention.linear import triton_backward as linear_backward
from refiner_ds.attention.linear import triton_forward as linear_forward
from tests.attention.cases import SCALE, bottleneck, leaves, linear, maps

NAMED = [(kind, name) for kind, names in CONFIGURATIONS.items() for name in names]


def single(part, device: torch.device):
    """A tensor, or a named tuple of such, in fp32 on a device."""

    def one(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().float().to(device).requires_grad_(x.requires_grad)

    return tree_map(one, part)


def results(kind: str, backend: str, device: torch.device) -> list[torch.Tensor]:
    """Output and gradients of a refiner in training, fp32."""
    torch.manual_seed(0)
    heads, tokens, width = 2, 10, 5
    q, k, value = (torch.randn(1, heads, tokens, width, device=device, requires_grad=True) for _ in range(3))
    made = bottleneck(heads, 2) if kind == "bottleneck" else linear(heads, 2)
    source, weights = single(maps(1, heads, tokens), device), single(made, device)
    attn = source if kind == "bottleneck" else DeferredMap(q, k, SCALE)
    out = attention.refine(attn, value, weights, 0.7, backend, "activations")
    direction = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves(attn, value, weights), direction)]


def options_of(monkeypatch) -> dict[str, dict]:
    """Each kernel's options at its last launch."""
    found, run = {}, launch._run

    def noting(kernel, grid, args, options):
        found[kernel.__name__.lstrip("_")] = options
        return run(kernel, grid, args, options)

    monkeypatch.setattr(launch, "_run", noting)
    return found


def close(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    pairs = zip(ours, truth, strict=True)
    return all((one - other).norm() <= 5e-4 * other.norm() + 1e-4 for one, other in pairs)


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_every_configuration_reaches_its_kernels_and_gives_eagers_numbers(kind, name, device, monkeypatch):
    truth, options = results(kind, "eager", device), options_of(monkeypatch)
    with configurations.using(kind, name):
        assert close(results(kind, "triton", device), truth)
    for kernel, sizes in CONFIGURATIONS[kind][name].items():
        launched = {key: options[kernel].get(key) for key in sizes if key != "SEGMENT"}
        assert launched == {key: size for key, size in sizes.items() if key != "SEGMENT"}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", ["bottleneck", "linear"])
def test_the_sizes_of_every_card_give_eagers_numbers(card, kind, device, monkeypatch):
    truth, options = results(kind, "eager", device), options_of(monkeypatch)
    for module in (triton_forward, triton_backward_local, triton_inference, linear_forward, linear_backward):
        monkeypatch.setattr(module, "architecture", lambda _: card)
    assert close(results(kind, "triton", device), truth)
    for kernel in set(CARDS[card]) & set(options):
        assert {key: options[kernel][key] for key in CARDS[card][kernel]} == CARDS[card][kernel]


@pytest.mark.parametrize("card", CARDS)
def test_the_sizes_of_every_card_evaluate_as_eager(card, device, monkeypatch):
    for module in (triton_forward, triton_inference):
        monkeypatch.setattr(module, "architecture", lambda _: card)
    weights = attention.fold_refiner(single(bottleneck(3, 2, training=False), device), 0.7)
    map_BHNN, value_BHNd = maps(2, 3, 9).float().to(device), torch.randn(2, 3, 9, 5, device=device)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            stored = map_BHNN.to(dtype), value_BHNd.to(dtype)
            ours = attention.refine(*stored, weights, 1.0, "triton").float()
            truth = attention.refine(*(x.float() for x in stored), weights, 1.0, "eager")
            assert (ours - truth).norm() <= tolerance * truth.norm()


def test_a_run_is_offered_the_configurations_of_its_kinds_where_kernels_are_a_candidate():
    q, k, value = (torch.randn(1, 3, 9, 5, requires_grad=True) for _ in range(3))
    weights = single(linear(3, 2), torch.device("cpu"))
    layer = choice.Layer("linear", DeferredMap(q, k, SCALE), value, weights, 1.0, False, 2, 1, "auto")
    names = [f"triton[{name}]" for name in CONFIGURATIONS["linear"]]
    if launch.INTERPRETED:
        assert choice.candidates(layer, kernels=True) == ["triton", "tiled", "eager", *names]
    assert not set(choice.candidates(layer, kernels=False)) & {"triton", *names}
    assert choice.counted_as(names[0]) == "triton"
