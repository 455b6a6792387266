"""Inference by one kernel equals the released refiner's equations with running statistics."""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention.fused.inference import refine_folded
from tests.attention.cases import SCALE, bottleneck, leaf, maps

# What storing T and the output in the maps' dtype explains; the interpreter cuts bfloat16 off instead of rounding it.
ERRORS = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}


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
        truth = attention.refine(attn.double(), value.double(), refiner, SCALE, way="reference")
        folded = attention.fold_refiner(refiner, SCALE)
    local = folded.local._replace(kernels=(folded.local.kernels[0].to(device),))
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in folded]
    ours = refine_folded(attn.to(device), value.to(device), type(folded)(*there)._replace(local=local)).cpu()
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    assert (ours.double() - truth).abs().max() < ERRORS[dtype] * truth.abs().max()


def test_inference_neither_sees_autocast_nor_makes_a_graph(device):
    refiner = attention.fold_refiner(bottleneck(3, 3, training=False), SCALE)
    single = [x.detach().float().to(device) if isinstance(x, torch.Tensor) else x for x in refiner]
    kernel = refiner.local.kernels[0].detach().float().to(device)
    refiner = type(refiner)(*single)._replace(local=refiner.local._replace(kernels=(kernel,)))
    attn = maps(1, 3, 7).float().to(device)
    value = torch.randn(1, 3, 7, 5, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        under = refine_folded(attn, value, refiner)
    assert under.dtype == torch.float32
    assert not under.requires_grad
    assert torch.equal(under, refine_folded(attn, value, refiner))
