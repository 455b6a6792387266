"""The backend "triton" gives whole models eager's numbers, and is not chosen by default where it does not."""

from __future__ import annotations

import pytest
import timm
import torch

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds import attention
from refiner_ds.attention import BACKENDS, Case, DeferredMap, dispatch
from refiner_ds.attention.backends import selfcheck
from refiner_ds.attention.backends.tiled import TiledBackend
from refiner_ds.attention.kernels.launch import INTERPRETED
from refiner_ds.attention.kernels.padded import row_stride, to_padded
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.cases import SCALE, bottleneck, leaf, linear, on

TRITON = BACKENDS["triton"]
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
def test_a_model_trains_and_evaluates_as_with_eager(layout, refiner, device):
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
def test_a_bottleneck_saves_two_or_ten_bytes_an_entry(save_for_backward, map_bytes, device):
    refiner = on(device, bottleneck(2, 3))

    def kept(batch: int) -> int:
        attn = to_padded(torch.rand(batch, 2, 6, 6, device=device).bfloat16()).requires_grad_()
        value = torch.randn(batch, 2, 6, 4, device=device).bfloat16().requires_grad_()
        return saved_bytes(
            lambda: attention.refine(attn, value, refiner, SCALE, "triton", save_for_backward), torch.nn.Module()
        )

    assert kept(2) - kept(1) == map_bytes * 2 * 6 * row_stride(6) + 2 * 2 * 6 * 4


def test_what_kernels_do_not_support_is_left_to_tiled_with_the_reason(device):
    double = [leaf(1, 2, 5, 4).to(device) for _ in range(3)]
    single = [x.float() for x in double]
    wide = "kernels take kernel_size 1 or 3, not 5"
    for kernel_size, reason in ((1, None), (3, None), (5, wide)):
        q, k, value = single
        pair = DeferredMap(q, k, SCALE)
        assert TRITON.supports(Case(pair, value, linear(2, 2, kernel_size))) == reason
        assert TRITON.supports(Case(q @ k.mT, value, bottleneck(2, 2, kernel_size))) == reason
        assert TRITON.supports(Case(pair, value)) is None
    q, k, value = double
    pair, reason = DeferredMap(q, k, SCALE), None if INTERPRETED else "kernels take no float64"
    assert TRITON.supports(Case(pair, value, linear(2, 2))) == TRITON.supports(Case(pair, value)) == reason
    assert TRITON.supports(Case(q @ k.mT, value, bottleneck(2, 2))) == reason
    with torch.no_grad():
        assert TRITON.supports(Case(q @ k.mT, value, bottleneck(2, 2, training=False))) == reason


def test_kernels_that_agree_with_tiled_pass_the_selfcheck(device, monkeypatch):
    monkeypatch.setattr(selfcheck, "HEADS", 2)
    if device.type == "cpu":  # interpreted, single precision is what the test above sees
        monkeypatch.setattr(selfcheck, "ALLOWED", {torch.bfloat16: selfcheck.ALLOWED[torch.bfloat16]})
    assert selfcheck.mismatch(TRITON, device, tokens=5) is None


class Off(TiledBackend):
    """Tiled, but for values in one dtype, whose outputs are wrong by a factor."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        self.factor, self.dtype = factor, dtype

    def refine(self, case, scale, save_for_backward):
        factor = self.factor if case.value_BHNd.dtype == self.dtype else 1
        return super().refine(case, scale, save_for_backward) * factor


class Broken(TiledBackend):
    """A backend that does not run."""

    def refine(self, case, scale, save_for_backward):
        raise RuntimeError("out of registers\nand more")


def test_the_selfcheck_names_what_is_wrong():
    cpu = torch.device("cpu")
    assert selfcheck.mismatch(TiledBackend(), cpu, tokens=9) is None
    assert selfcheck.mismatch(Broken(), cpu, tokens=9) == "fail (RuntimeError: out of registers)"
    assert selfcheck.mismatch(Off(1.1, torch.float32), cpu, tokens=9).endswith("% from the tiled backend")
    assert selfcheck.mismatch(Off(1.5, torch.bfloat16), cpu, tokens=9).endswith("% from the tiled backend")
    assert (
        selfcheck.mismatch(Off(float("nan"), torch.bfloat16), cpu, tokens=9) == "differ by nan% from the tiled backend"
    )


def test_a_mismatch_is_warned_about_and_leaves_tiled_the_default(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(dispatch, "kernels_verified", dispatch.kernels_verified.__wrapped__)
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setattr(selfcheck, "mismatch", lambda *_: "fail")
    with pytest.warns(UserWarning, match="^attention: tiled on cuda, because the Triton kernels fail$"):
        assert attention.resolve_backend(device=gpu) == "tiled"
    monkeypatch.setattr(selfcheck, "mismatch", lambda *_: None)
    assert attention.resolve_backend(device=gpu) == "triton"
    assert attention.resolve_backend(device=cpu) == "tiled"
