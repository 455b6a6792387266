"""Inference by one kernel equals the released refiner's equations with running statistics."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import FoldedWeights
from refiner_ds.attention.bottleneck.triton_inference import refine_folded
from tests.attention.cases import SCALE, bottleneck, leaf, maps

# What storing T and the output in the maps' dtype explains; the interpreter cuts bfloat16 off instead of rounding it.
ERRORS = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}


def moved(refiner: FoldedWeights, device: torch.device, dtype: torch.dtype) -> FoldedWeights:
    """The refiner on another device."""
    local = refiner.local._replace(kernels=(refiner.local.kernels[0].detach().to(device, dtype),))
    tensors = [x.detach().to(device, dtype) if isinstance(x, torch.Tensor) else x for x in refiner]
    return FoldedWeights(*tensors)._replace(local=local)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "ratio", "side", "dtype"),
    [
        (2, 4, 9, 3, 3, torch.float32),
        (1, 17, 6, 2, 3, torch.float32),
        (3, 3, 8, 9, 1, torch.float32),
        (1, 12, 7, 3, 3, torch.bfloat16),
        (2, 3, 10, 4, 3, torch.float16),
    ],
)
def test_inference_equals_the_equations(batch, heads, tokens, ratio, side, dtype, device):
    refiner = bottleneck(heads, ratio, side, training=False)
    with torch.no_grad():
        refiner.norm1_E.weight.mul_(tokens)
    attn = maps(batch, heads, tokens).detach().to(dtype)
    value = leaf(batch, tokens, heads, 5).detach().to(dtype).transpose(1, 2)
    with torch.no_grad():
        truth = attention.refine(attn.double(), value.double(), refiner, SCALE, backend="eager")
        folded = attention.fold_refiner(refiner, SCALE)
    ours = refine_folded(attn.to(device), value.to(device), moved(folded, device, torch.float64)).cpu()
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    assert (ours.double() - truth).abs().max() < ERRORS[dtype] * truth.abs().max()


def test_inference_neither_sees_autocast_nor_makes_a_graph(device):
    refiner = moved(attention.fold_refiner(bottleneck(3, 3, training=False), SCALE), device, torch.float32)
    attn = maps(1, 3, 7).float().to(device)
    value = torch.randn(1, 3, 7, 5, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        under = refine_folded(attn, value, refiner)
    assert under.dtype == torch.float32
    assert not under.requires_grad
    assert torch.equal(under, refine_folded(attn, value, refiner))


def test_maps_may_lie_anyhow(device):
    refiner = moved(attention.fold_refiner(bottleneck(2, 2, training=False), SCALE), device, torch.float32)
    attn, value = maps(1, 2, 5).detach().float().to(device), torch.randn(1, 2, 5, 4, device=device)
    truth = refine_folded(attn, value, refiner)
    assert torch.equal(refine_folded(attn.mT.contiguous().mT, value, refiner), truth)
