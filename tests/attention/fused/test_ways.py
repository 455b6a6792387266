"""The way "triton" gives whole models the plain composition's numbers, and is not chosen where it does not."""

from __future__ import annotations

import types

import pytest
import timm
import torch

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds import attention
from refiner_ds.attention import DeferredMap, dispatch, lean
from refiner_ds.attention.fused import backends, trial
from refiner_ds.attention.fused.layout import laid_out, row_stride
from refiner_ds.benchmark.measure import kept_bytes
from tests.attention.cases import SCALE, bottleneck, leaf, linear, on

SIZES = {"img_size": 24, "patch_size": 8, "stem_chs": (4, 4, 4), "embed_dim": 12, "num_heads": 3, "depth": 2}


def training_step(model: torch.nn.Module, images: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """Logits, gradients and running statistics of one step, and then the logits of evaluation."""
    model.zero_grad()
    with attention.attention_backend(backend):
        out = model.train()(images, mix_box=(0, 0, 0, 0))
        (out[0].square().sum() + out[1].square().sum()).backward()
        statistics = [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]
        with torch.no_grad():
            evaluated = model.eval()(images)
    # bn3's bias is taken away by the next norm: its gradient is rounding in one way, zero in the other.
    gradients = [x.grad.clone() for name, x in model.named_parameters() if "bn3.bias" not in name]
    return [out[0].detach(), out[1].detach(), *gradients, *statistics, evaluated]


@pytest.mark.parametrize(("layout", "refiner"), [("paper", "linear"), ("released", "bottleneck")])
def test_a_model_trains_and_evaluates_as_with_the_plain_composition(layout, refiner, device):
    model = timm.create_model("refined_vit", layout=layout, refiner=refiner, num_classes=5, **SIZES).to(device)
    with torch.no_grad():
        for block in model.blocks:  # of nearly uniform maps norm 1 would make rounding so large that gates flip
            block.attn.qkv.weight.mul_(20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 24, 24, device=device)
    truth = training_step(model, images, "eager")
    model.load_state_dict(before)
    for one, other in zip(training_step(model, images, "triton"), truth, strict=True):
        assert (one - other).norm() <= 5e-5 * other.norm() + 1e-6


@pytest.mark.parametrize(("save_for_backward", "map_bytes"), [("map", 2), ("activations", 2 + 2 * 3 + 2)])
def test_a_bottleneck_keeps_two_or_ten_bytes_an_entry(save_for_backward, map_bytes, device):
    refiner = on(device, bottleneck(2, 3))

    def kept(batch: int) -> int:
        attn = laid_out(torch.rand(batch, 2, 6, 6, device=device).bfloat16()).requires_grad_()
        value = torch.randn(batch, 2, 6, 4, device=device).bfloat16().requires_grad_()
        return kept_bytes(
            lambda: attention.refine(attn, value, refiner, SCALE, "triton", save_for_backward), torch.nn.Module()
        )

    assert kept(2) - kept(1) == map_bytes * 2 * 6 * row_stride(6) + 2 * 2 * 6 * 4


def test_fused_leaves_to_lean_what_it_does_not_know(device):
    double = [leaf(1, 2, 5, 4).to(device) for _ in range(3)]
    single = [x.float() for x in double]
    cases = (single, 1, True), (single, 3, True), (single, 5, False), (double, 3, False)
    for (q, k, value), kernel_size, known in cases:
        pair = DeferredMap(q, k, SCALE)
        assert backends.knows(pair, value, linear(2, 2, kernel_size)) is known
        assert backends.knows(q @ k.mT, value, bottleneck(2, 2, kernel_size)) is known
        assert backends.knows_maps(pair) is (value.dtype == torch.float32)


def test_kernels_that_give_what_lean_gives_have_no_fault(device, monkeypatch):
    monkeypatch.setattr(trial, "HEADS", 2)
    if device.type == "cpu":  # interpreted, single precision is what the test above sees
        monkeypatch.setattr(trial, "ALLOWED", {torch.bfloat16: trial.ALLOWED[torch.bfloat16]})
    assert trial.fault(backends, device, tokens=5) is None


def off(factor: float, dtype: torch.dtype) -> types.SimpleNamespace:
    """Lean, but for values in one dtype, whose outputs are a factor off."""

    def refine(attn, value, *others):
        return lean.refine(attn, value, *others) * (factor if value.dtype == dtype else 1)

    return types.SimpleNamespace(refine=refine, make_map=lean.make_map, attend=lean.attend)


def test_a_fault_is_said_and_leaves_the_choice_to_lean(monkeypatch):
    def breaks(*_):
        raise RuntimeError("out of registers\nand more")

    broken = types.SimpleNamespace(refine=breaks, make_map=lean.make_map, attend=lean.attend)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert trial.fault(lean, cpu, tokens=9) is None
    assert trial.fault(broken, cpu, tokens=9) == "fail (RuntimeError: out of registers)"
    assert trial.fault(off(1.1, torch.float32), cpu, tokens=9).endswith("% off what lean gives")
    assert trial.fault(off(1.5, torch.bfloat16), cpu, tokens=9).endswith("% off what lean gives")
    assert trial.fault(off(float("nan"), torch.bfloat16), cpu, tokens=9) == "are nan% off what lean gives"
    monkeypatch.setattr(dispatch, "_trusted", dispatch._trusted.__wrapped__)
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setattr(trial, "fault", lambda *_: "fail")
    with pytest.warns(UserWarning, match="computed by the tiled backend on cuda: its Triton kernels fail$"):
        assert attention.resolve_backend(device=gpu) == "tiled"
    monkeypatch.setattr(trial, "fault", lambda *_: None)
    assert attention.resolve_backend(device=gpu) == "triton"
    assert attention.resolve_backend(device=cpu) == "tiled"
