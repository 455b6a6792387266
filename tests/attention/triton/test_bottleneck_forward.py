"""The released refiner's kernels, each against its equations in float64 on the same stored maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refiner_ds.attention import FoldedWeights, LocalKernels, equations
from refiner_ds.attention.bottleneck import triton_forward
from refiner_ds.attention.bottleneck.triton_forward import expand_local, output, reduce
from refiner_ds.attention.bottleneck.triton_inference import refine_folded

# What the arithmetic may err by, and what storing a result adds to it, relative to the largest value: the interpreter
# cuts bfloat16 off instead of rounding it.
SUMS = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-5}
STORING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}

# Batch, heads, expanded maps, tokens, kernel: heads to pad, groups that share maps, more than one tile and segment.
SHAPES = [(2, 3, 9, 7, 3), (1, 12, 36, 10, 3), (3, 2, 27, 9, 3), (1, 17, 20, 6, 3), (1, 4, 16, 11, 1)]
CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[2], torch.bfloat16), (SHAPES[0], torch.float16)]


def case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Maps and folded weights with which both ends of both clips are reached."""
    batch, heads, wide, tokens, side = shape
    made = {
        "map_BHNN": torch.randn(batch, heads, tokens, tokens).mul(2).softmax(-1).to(dtype),
        "folded_EH": torch.randn(wide, heads) * 8,
        "shift1_E": torch.randn(wide) * 2 + 2,
        "kernel_E1kk": torch.randn(wide, 1, side, side),
        "gain2_E": torch.randn(wide) / 2,
        "shift2_E": torch.randn(wide) * 2 + 2,
        "reduce_HE": torch.randn(heads, wide),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def expanded(map_BHNN: Tensor, folded_EH: Tensor, shift1_E: Tensor, kernel_E1kk: Tensor) -> Tensor:
    """h2 in float64."""
    expanded_BENN = equations.expand(map_BHNN.double(), folded_EH.double()) + shift1_E.double()[:, None, None]
    return equations.distributed_local_attention(expanded_BENN.clamp(0, 6), kernel_E1kk.double())


def projected(local_BENN: Tensor, gain2_E: Tensor, shift2_E: Tensor, reduce_HE: Tensor) -> Tensor:
    """h3 in float64."""
    normed_BENN = local_BENN.double() * gain2_E.double()[:, None, None] + shift2_E.double()[:, None, None]
    return equations.reduce(normed_BENN.clamp(0, 6), reduce_HE.double())


def evaluated(
    map_BHNN: Tensor,
    folded_EH: Tensor,
    shift1_E: Tensor,
    kernel_E1kk: Tensor,
    gain2_E: Tensor,
    shift2_E: Tensor,
    reduce_HE: Tensor,
) -> Tensor:
    """Refined maps times the identity, by the kernel for inference."""
    local = LocalKernels((kernel_E1kk * gain2_E[:, None, None, None],), "none", (1, 1))
    nothing_H = map_BHNN.new_zeros(len(reduce_HE))
    weights = FoldedWeights(folded_EH, shift1_E, local, None, shift2_E, reduce_HE, nothing_H, nothing_H)
    return refine_folded(map_BHNN, torch.eye(map_BHNN.shape[-1], device=map_BHNN.device).expand_as(map_BHNN), weights)


def joint(reduced_BHNN: Tensor, map_BHNN: Tensor) -> Tensor:
    """Covariance of h3 and A within each head."""
    both_H2L = torch.stack((reduced_BHNN, map_BHNN.double())).permute(2, 0, 1, 3, 4).flatten(2)
    return torch.stack([both_2L.cov(correction=0) for both_2L in both_H2L], -1)


def close(ours: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether no entry is off by more than ``tolerance`` times the largest."""
    assert ours.shape == truth.shape
    return bool((ours.double() - truth).abs().max() <= tolerance * truth.abs().max())


def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_forward, "SEGMENT", 6)
    monkeypatch.setattr(triton_forward, "STEPS", 2)
    monkeypatch.setattr(triton_forward, "ROWS", 16)
    monkeypatch.setattr(triton_forward, "COLUMNS", 16)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_expansion_and_local_attention_with_their_moments(shape, dtype, device, monkeypatch):
    few_rows(monkeypatch)
    made = case(shape, dtype, device)
    inputs = [made[name] for name in ("map_BHNN", "folded_EH", "shift1_E", "kernel_E1kk")]
    truth = expanded(*inputs)
    local_BENN, mean_E, variance_E = expand_local(*inputs)
    assert local_BENN.dtype == dtype
    assert close(local_BENN, truth, SUMS[dtype] + STORING[dtype])
    assert close(mean_E, truth.mean((0, 2, 3)), SUMS[dtype])
    assert close(variance_E, truth.var((0, 2, 3), correction=0), SUMS[dtype])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_projection_with_its_moments(shape, dtype, device, monkeypatch):
    few_rows(monkeypatch)
    made = case(shape, dtype, device)
    batch, _, wide, tokens, _ = shape
    local_BENN = (torch.randn(batch, wide, tokens, tokens) * 4).to(device, dtype)
    weights = [made[name] for name in ("gain2_E", "shift2_E", "reduce_HE")]
    truth = projected(local_BENN, *weights)
    reduced_BHNN, mean3_H, joint_22H = reduce(local_BENN, made["map_BHNN"], *weights)
    assert reduced_BHNN.dtype == dtype
    assert close(reduced_BHNN, truth, SUMS[dtype] + STORING[dtype])
    assert close(mean3_H, truth.mean((0, 2, 3)), SUMS[dtype])
    for ours, true in zip(joint_22H.flatten(0, 1), joint(truth, made["map_BHNN"]).flatten(0, 1), strict=True):
        assert close(ours, true, SUMS[dtype])


def test_moments_of_padded_sequences_keep_their_digits(device, monkeypatch):
    """Far from zero, so that a part that begins with padding needs a pilot of its own."""
    few_rows(monkeypatch)
    monkeypatch.setattr(triton_forward, "POSITIONS", 16)
    monkeypatch.setattr(triton_forward, "SEGMENT", 24)
    mask_BN = torch.arange(24).ge(torch.tensor([[17], [3]])).to(device)
    real_BNN = mask_BN[:, :, None] & mask_BN[:, None]
    made = case((2, 3, 9, 24, 1), torch.float32, device)
    map_BHNN = made["map_BHNN"] * real_BNN[:, None]
    weights = made["folded_EH"] * 1e-3, torch.full_like(made["shift1_E"], 3.0), made["kernel_E1kk"]
    local_BENN, mean_E, variance_E = expand_local(map_BHNN, *weights, mask_BN)
    truth_EL = expanded(map_BHNN, *weights).transpose(0, 1)[:, real_BNN]
    assert close(local_BENN.transpose(0, 1)[:, real_BNN], truth_EL, SUMS[torch.float32])
    assert not local_BENN.transpose(0, 1)[:, ~real_BNN].any()
    assert close(mean_E, truth_EL.mean(1), 1e-6)
    assert ((variance_E - truth_EL.var(1, correction=0)).abs() < 3e-4 * truth_EL.var(1, correction=0)).all()
    local_BENN = 1 + torch.randn(2, 9, 24, 24, device=device) * 1e-3
    weights = torch.full_like(made["gain2_E"], 1.0), torch.full_like(made["shift2_E"], 2.0), made["reduce_HE"]
    reduced_BHNN, mean3_H, joint_22H = reduce(local_BENN, map_BHNN, *weights, mask_BN)
    truth_BHNN = projected(local_BENN, *weights)
    both_2HL = torch.stack((truth_BHNN, map_BHNN.double())).transpose(1, 2)[:, :, real_BNN]
    assert close(mean3_H, both_2HL[0].mean(1), 1e-6)
    assert not reduced_BHNN.transpose(0, 1)[:, ~real_BNN].any()
    truth_22H = torch.stack([both_2HL[:, head].cov(correction=0) for head in range(3)], -1)
    for which in ((0, 0), (1, 1)):
        assert ((joint_22H[which] - truth_22H[which]).abs() < 1e-3 * truth_22H[which]).all()


@pytest.mark.parametrize("dtype", list(SUMS))
@pytest.mark.parametrize(("batch", "heads", "tokens", "width"), [(2, 3, 7, 5), (1, 2, 37, 35)])
def test_output_rounds_nothing_but_itself(batch, heads, tokens, width, dtype, device, monkeypatch):
    few_rows(monkeypatch)
    maps = torch.randn(2, batch, heads, tokens, tokens).to(device, dtype)
    # Values as a block has them: heads lie between the tokens and the width.
    value_BHNd = torch.randn(batch, tokens, heads, width).to(device, dtype).transpose(1, 2)
    affine = torch.randn(3, heads, device=device)
    alpha, beta, gamma = affine.double()[:, :, None, None]
    truth = equations.attend(alpha * maps[0].double() + beta * maps[1].double() + gamma, value_BHNd.double())
    out_BHNd = output(maps[0], maps[1], *affine, value_BHNd)
    assert out_BHNd.dtype == dtype
    assert out_BHNd.is_contiguous()
    assert close(out_BHNd, truth, 2e-6 + STORING[dtype])


@pytest.mark.parametrize("name", ["folded_EH", "shift1_E", "kernel_E1kk", "gain2_E", "shift2_E", "reduce_HE"])
def test_no_clip_hides_a_weight_that_is_not_a_number(name, device):
    made = case((1, 2, 3, 4, 3), torch.float32, device)
    made[name].view(-1)[0] = float("nan")
    assert evaluated(**made)[:, 0].isnan().all()
    if name in ("folded_EH", "shift1_E", "kernel_E1kk"):
        local_BENN, mean_E, _ = expand_local(*(made[part] for part in list(made)[:4]))
        assert local_BENN[:, 0].isnan().all()
        assert mean_E.isnan().tolist() == [True, False, False]
    else:
        local_BENN = torch.ones(1, 3, 4, 4, device=device)
        weights = [made[part] for part in ("gain2_E", "shift2_E", "reduce_HE")]
        assert reduce(local_BENN, made["map_BHNN"], *weights)[0][:, 0].isnan().all()
