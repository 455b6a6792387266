"""FLOP counters see the operators themselves, and count what the eager composition multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import refiner_ds.models  # noqa: F401  registers the names
from refiner_ds.attention import attention_backend
from refiner_ds.attention.flops import flops_of

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8, "num_classes": 3}
OPERATORS = {
    "linear": {"layout": "paper", "refiner": "linear", "expand": False},
    "without-reduction": {"layout": "paper", "refiner": "linear", "expansion_ratio": 2, "reduce": False},
    "bottleneck": {"layout": "released", "refiner": "bottleneck"},
}


class Counted(TorchDispatchMode):
    """Sums up `flops_of` in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        self.names.add(func.namespace)
        return out


def of_a_step(backend: str, options: dict[str, Any]) -> tuple[int, int, set[str]]:
    """FLOPs of forward and of backward, and the namespaces of the operators."""
    model = timm.create_model("refined_vit", **SMALL, **options).train()
    with attention_backend(backend), Counted() as counted:
        out, dense, *_ = model(torch.randn(2, 3, 32, 32))
        forward = counted.total
        (out.sum() + dense.sum()).backward()
    return forward, counted.total - forward, counted.names


@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_counts_as_the_eager_composition(kind: str) -> None:
    forward, backward, names = of_a_step("eager", OPERATORS[kind])
    assert "refiner_ds" not in names
    found, found_backward, names = of_a_step("tiled", OPERATORS[kind])
    assert "refiner_ds" in names
    assert (found, found_backward) == (forward, backward)


def test_convolutions_that_are_combined_into_one_count_as_that_one() -> None:
    options = {"layout": "paper", "refiner": "linear", "expansion_ratio": 3}
    forward, _, _ = of_a_step("eager", options)
    found, _, _ = of_a_step("tiled", options)
    heads, expanded, kernel, entries = 4, 12, 9, 2 * 17 * 17
    three = 2 * entries * (expanded * heads + expanded * kernel + heads * expanded)
    one = 2 * entries * heads * heads * kernel
    combining = 2 * heads * expanded * heads * kernel
    assert forward - found == SMALL["depth"] * (three - one - combining)


@pytest.mark.parametrize("kind", OPERATORS)
def test_pytorchs_flop_counter_sees_the_operators(kind: str) -> None:
    model = timm.create_model("refined_vit", **SMALL, **OPERATORS[kind]).train()
    images = torch.randn(2, 3, 32, 32)
    counts = {}
    for backend in ("eager", "tiled"):
        with attention_backend(backend), FlopCounterMode(display=False) as counter:
            model(images)
        counts[backend] = counter.get_total_flops(), counter.get_flop_counts()
    assert counts["eager"][0] == counts["tiled"][0]
    operator = "refine_bottleneck" if kind == "bottleneck" else "refine_linear"
    inside = counts["tiled"][1]["RefinedViT.blocks.3.attn"]
    assert any(operator in str(packet) for packet in inside)


def test_hooks_of_all_modules_still_have_every_layer_called() -> None:
    model = timm.create_model("refined_vit", **SMALL, **OPERATORS["linear"])
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.add(module) and None)
    try:
        with FlopCounterMode(display=False):
            model(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert model.blocks[0].attn.refiner.depth_sep_conv in called


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_backward_of_a_convolution_counts_twice_its_forward_whatever_its_groups(layer: Any, groups: int) -> None:
    conv = layer(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    images = torch.randn(2, 8, 9, 9, requires_grad=True)
    with Counted() as counted:
        out = conv(images)
        forward = counted.total
        out.sum().backward()
    assert forward > 0
    assert counted.total - forward == 2 * forward


def test_evaluation_with_folded_norms_counts_alike_too() -> None:
    counts = {}
    for backend in ("eager", "tiled"):
        model = timm.create_model("refined_vit", **SMALL, **OPERATORS["bottleneck"]).eval()
        with attention_backend(backend), torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 32, 32))
        counts[backend] = counter.get_total_flops()
        names = {str(packet) for packet in counter.get_flop_counts()["Global"]}
        assert ("refiner_ds.refine_folded" in names) == (backend == "tiled")
    assert counts["eager"] == counts["tiled"]


@pytest.mark.parametrize("residual", [False, True])
def test_kernels_that_make_a_map_and_multiply_with_it_count_both_products(residual: bool) -> None:
    attend, backward = torch.ops.refiner_ds.attend.default, torch.ops.refiner_ds.attend_backward.default
    q, value = torch.empty(2, 4, 17, 8), torch.empty(2, 4, 17, 8)
    maps = torch.empty(2, 4, 17, 17)
    product = 2 * 2 * 4 * 17 * 17 * 8
    numbers = (1.0, 0.0, 0, None)
    given = (q, q, value, maps if residual else None, *numbers)
    assert flops_of(attend, given, {}, (value, maps, q[..., 0])) == 2 * product
    saved = (q, q, value, q[..., 0], maps, None, *numbers)
    assert flops_of(backward, (value, None, *saved), {}, [q, q, value]) == 4 * product
    assert flops_of(backward, (None, maps, *saved), {}, [q, q]) == 2 * product
