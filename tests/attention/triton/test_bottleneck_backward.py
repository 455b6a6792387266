"""The released refiner's kernels backward, each against its equations in float64 on the same stored maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import equations
from refiner_ds.attention.bottleneck import triton_backward, triton_backward_local
from refiner_ds.attention.bottleneck.norm_algebra import NormAlgebra
from refiner_ds.attention.bottleneck.triton_backward import bwd_map_statistics, bwd_output, bwd_reduce
from refiner_ds.attention.bottleneck.triton_backward_local import bwd_expand_local
from refiner_ds.attention.kernels.padded import to_padded
from tests.attention.cases import SCALE, bottleneck, leaf, maps
from tests.attention.test_tiled_bottleneck import _like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What the arithmetic may err by, and what storing a result adds to it, relative to the largest value. The interpreter
# cuts numbers off where a GPU rounds them to bfloat16.
SUMS = {torch.float32: 1e-5, torch.bfloat16: 3e-5, torch.float16: 1e-5}
STORING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}

BIAS3 = 10  # among all gradients, that of the third norm's bias

# Batch, heads, expanded maps, tokens: heads and groups to pad, more than one program and step.
SHAPES = [(2, 3, 9, 7), (1, 12, 36, 9), (1, 17, 34, 6)]


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backward, "ROWS", dict.fromkeys([*DTYPES, torch.float64], 16))
    for name, size in {"KEYS": 16, "STEPS": 2, "POSITIONS": 32, "WARPS": 2}.items():
        monkeypatch.setattr(triton_backward, name, size)
    for name, size in {"ROWS": 4, "PROGRAMS": 2}.items():
        monkeypatch.setattr(triton_backward_local, name, size)


def stored(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers as they are stored."""
    return torch.randn(*shape).to(device, dtype)


def columns(x_C: Tensor) -> Tensor:
    """A number a map, to be combined with maps, float64."""
    return x_C.double()[:, None, None]


def close(ours: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether no entry is off by more than ``tolerance`` times the largest."""
    assert ours.shape == truth.shape
    return bool((ours.double() - truth).abs().max() <= tolerance * truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "tokens", "width"), [(2, 3, 7, 5), (1, 2, 37, 35)])
def test_gradient_of_the_values_and_of_the_refined_maps(batch, heads, tokens, width, dtype, device, monkeypatch):
    small_pieces(monkeypatch)
    map_BHNN, reduced_BHNN = stored(2, batch, heads, tokens, tokens, dtype=dtype, device=device)
    # Values as a block has them: heads lie between the tokens and the width.
    value_BHNd = stored(batch, tokens, heads, width, dtype=dtype, device=device).transpose(1, 2)
    grad_BHNd = stored(batch, heads, tokens, width, dtype=dtype, device=device)
    alpha_H, beta_H, gamma_H, mean3_H, mean_H = torch.randn(5, heads, device=device).double()
    ours = bwd_output(map_BHNN, reduced_BHNN, value_BHNd, grad_BHNd, alpha_H, beta_H, gamma_H, mean3_H, mean_H)
    map_BHNN, reduced_BHNN = map_BHNN.double(), reduced_BHNN.double()
    refined_BHNN = columns(alpha_H) * reduced_BHNN + columns(beta_H) * map_BHNN + columns(gamma_H)
    dt_BHNN = grad_BHNd.double() @ value_BHNd.double().mT
    assert ours[0].dtype == ours[1].dtype == dtype
    assert close(ours[0], refined_BHNN.mT @ grad_BHNd.double(), 2e-6 + STORING[dtype])
    assert close(ours[1], dt_BHNN, 2e-6 + STORING[dtype])
    for sum_H, weight in zip(ours[2:], (1, reduced_BHNN - columns(mean3_H), map_BHNN - columns(mean_H)), strict=True):
        # Beside sums without signs: what is left of these says little about the arithmetic.
        apart_H = (sum_H - (dt_BHNN * weight).sum((0, 2, 3))).abs()
        assert (apart_H <= 1e-6 * (dt_BHNN * weight).abs().sum((0, 2, 3))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_back_through_projection_and_second_norm(shape, dtype, device, monkeypatch):
    small_pieces(monkeypatch)
    batch, heads, wide, tokens = shape
    narrow = stored(3, batch, heads, tokens, tokens, dtype=dtype, device=device)
    map_BHNN, reduced_BHNN, dt_BHNN = narrow
    local_BENN = stored(batch, wide, tokens, tokens, dtype=dtype, device=device) * 4
    to_reduced = torch.randn(4, heads, device=device).double()
    gain_E, shift_E, mean_E = torch.randn(3, wide, device=device).double()
    shift_E += 2
    reduce_HE = torch.randn(heads, wide, device=device)
    ours = bwd_reduce(map_BHNN, reduced_BHNN, dt_BHNN, local_BENN, to_reduced, gain_E, shift_E, mean_E, reduce_HE)
    map_BHNN, reduced_BHNN, dt_BHNN = narrow.double()
    gain, on_reduced, on_map, level = (columns(x_H) for x_H in to_reduced)
    dh3_BHNN = gain * dt_BHNN + on_reduced * reduced_BHNN + on_map * map_BHNN + level
    before_BENN = columns(gain_E) * local_BENN.double() + columns(shift_E)
    m2_BENN = equations.expand(dh3_BHNN, reduce_HE.double().T) * ((before_BENN > 0) & (before_BENN < 6))
    dot = project_tolerance(dtype)
    assert ours[0].dtype == dtype
    assert close(ours[0], m2_BENN, dot + STORING[dtype])
    assert close(ours[1], torch.einsum("bhqk,beqk->he", dh3_BHNN, before_BENN.clamp(0, 6)), dot)
    assert close(ours[2], m2_BENN.sum((0, 2, 3)), dot)
    assert close(ours[3], (m2_BENN * (local_BENN.double() - columns(mean_E))).sum((0, 2, 3)), dot)


def project_tolerance(dtype: torch.dtype) -> float:
    """Beside half precision one tf32 dot is enough, and nearly all of it can be lost in sums with signs."""
    return SUMS[dtype] if dtype == torch.float32 or not torch.cuda.is_available() else 2.0**-10


# Heads to pad, a kernel of one tap, several images a tile, more than one tile, groups, steps and segments.
@pytest.mark.parametrize(
    ("shape", "dtype", "keys"),
    [
        ((2, 3, 9, 7, 3), torch.float32, 8),
        ((2, 3, 9, 7, 3), torch.bfloat16, 8),
        ((2, 3, 9, 7, 3), torch.float16, 4),
        ((1, 2, 20, 11, 3), torch.float32, 4),
        ((5, 1, 3, 5, 3), torch.bfloat16, 8),
        ((1, 17, 17, 5, 1), torch.float32, 8),
    ],
)
def test_back_through_local_kernels_and_expansion(shape, dtype, keys, device, monkeypatch):
    small_pieces(monkeypatch)
    monkeypatch.setattr(triton_backward_local, "KEYS", keys)
    batch, heads, wide, tokens, side = shape
    map_BHNN = torch.randn(batch, heads, tokens, tokens).mul(2).softmax(-1).to(device, dtype)
    local_BENN, m2_BENN = stored(2, batch, wide, tokens, tokens, dtype=dtype, device=device)
    folded_EH, shift1_E = torch.randn(wide, heads, device=device) * 8, torch.randn(wide, device=device) * 2 + 2
    kernel_E1kk = torch.randn(wide, 1, side, side, device=device)
    gain2_E, slope_E, level_E = torch.randn(3, wide, device=device).double()
    mean_H = torch.rand(heads, device=device).double()
    norm2 = gain2_E, slope_E, level_E
    ours = bwd_expand_local(map_BHNN, local_BENN, m2_BENN, folded_EH, shift1_E, kernel_E1kk, *norm2, mean_H)
    folded_EH, kernel_E1kk = folded_EH.double(), kernel_E1kk.double().requires_grad_()
    before_BENN = (equations.expand(map_BHNN.double(), folded_EH) + columns(shift1_E)).requires_grad_()
    behind_BENN = equations.distributed_local_attention(before_BENN.clamp(0, 6), kernel_E1kk)
    dh2_BENN = columns(gain2_E) * m2_BENN.double() + columns(slope_E) * local_BENN.double() + columns(level_E)
    m1_BENN, d_kernel_E1kk = torch.autograd.grad(behind_BENN, (before_BENN, kernel_E1kk), dh2_BENN)
    dot = project_tolerance(dtype)
    assert ours[0].dtype == dtype
    assert close(ours[0], equations.expand(m1_BENN, folded_EH.T), dot + STORING[dtype])
    assert close(ours[1], d_kernel_E1kk, SUMS[dtype])
    assert close(ours[2], m1_BENN.sum((0, 2, 3)), SUMS[dtype])
    centred_BHNN = map_BHNN.double() - columns(mean_H)
    assert close(ours[3], torch.einsum("beqk,bhqk->eh", m1_BENN, centred_BHNN), dot)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(2, 3, 7), (1, 17, 12)])
def test_back_through_the_statistics_of_the_first_norm(batch, heads, tokens, dtype, device, monkeypatch):
    small_pieces(monkeypatch)
    map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN = stored(4, batch, heads, tokens, tokens, dtype=dtype, device=device)
    to_map = torch.randn(4, heads, device=device).double()
    gain_HH, level_H = torch.randn(heads, heads, device=device).double(), torch.randn(heads, device=device).double()
    truth = equations.expand(map_BHNN.double(), gain_HH) + columns(level_H) + share_BHNN.double()
    for factor_H, part in zip(to_map, (dt_BHNN, reduced_BHNN, map_BHNN, torch.ones_like(map_BHNN)), strict=True):
        truth += columns(factor_H) * part.double()
    share_BHNN = to_padded(share_BHNN)
    d_map_BHNN = bwd_map_statistics(map_BHNN, reduced_BHNN, dt_BHNN, share_BHNN, to_map, gain_HH, level_H)
    assert d_map_BHNN.data_ptr() == share_BHNN.data_ptr()
    assert close(d_map_BHNN, truth, 2e-6 + STORING[dtype])


def chained(attn: Tensor, value: Tensor, refiner, direction: Tensor) -> list[Tensor]:
    """Every gradient, by the four passes on activations made in float64 and stored in the map's dtype."""
    dtype, batch_dims = attn.dtype, (0, 2, 3)
    algebra = NormAlgebra(refiner, SCALE, attn.numel() // attn.shape[1])
    exact = attn.detach().double()
    flat_HL = exact.transpose(0, 1).flatten(1)
    algebra.fold_norm1(flat_HL.mean(1), flat_HL.cov(correction=0))
    kernel_E1kk, reduce_HE = refiner.local.kernels[0].detach(), refiner.reduce_HE.detach()
    wide = (equations.expand(exact, algebra.folded_EH) + columns(algebra.shift1_E)).clamp(0, 6)
    local = equations.distributed_local_attention(wide, kernel_E1kk.double())
    algebra.fold_norm2(local.mean(batch_dims), local.var(batch_dims, correction=0))
    local = local.to(dtype)
    clipped = (columns(algebra.gain2_E) * local.double() + columns(algebra.shift2_E)).clamp(0, 6)
    narrow = equations.reduce(clipped, reduce_HE.double())
    both_H2L = torch.stack((narrow, exact)).permute(2, 0, 1, 3, 4).flatten(2)
    joint_22H = torch.stack([both_2L.cov(correction=0) for both_2L in both_H2L], -1)
    algebra.fold_norms34(narrow.mean(batch_dims), joint_22H)
    attn, narrow, value = attn.detach(), narrow.to(dtype), value.detach()
    d_value, dt, *sums = bwd_output(
        attn, narrow, value, direction,
        algebra.alpha_H, algebra.beta_H, algebra.gamma_H, algebra.mean3_H, algebra.mean_H,
    )  # fmt: skip
    to_reduced, to_map = algebra.backward_norms34(*sums)
    m2, d_reduce_HE, q0_E, q1_E = bwd_reduce(
        attn, narrow, dt, local, to_reduced, algebra.gain2_E, algebra.shift2_E, algebra.mean2_E, reduce_HE
    )
    slopes = algebra.backward_norm2(q0_E, q1_E)
    share, d_kernel_E1kk, p0_E, cross_EH = bwd_expand_local(
        attn, local, m2, algebra.folded_EH, algebra.shift1_E, kernel_E1kk, algebra.gain2_E, *slopes, algebra.mean_H
    )
    d_map = bwd_map_statistics(attn, narrow, dt, share, to_map, *algebra.backward_norm1(p0_E, cross_EH))
    return [d_map, d_value, algebra.d_expand_EH, d_kernel_E1kk, d_reduce_HE, *algebra.norm_gradients()]


def gradients(attn: Tensor, value: Tensor, refiner, direction: Tensor, backend: str) -> list[Tensor]:
    """Every gradient, in the order the passes have them."""
    out = attention.refine(attn, value, refiner, SCALE, backend=backend)
    norms = [x for one in (refiner.norm1_E, refiner.norm2_E, refiner.norm3_H, refiner.adapt_H) for x in one[:2]]
    weights = refiner.expand_EH, refiner.local.kernels[0], refiner.reduce_HE
    return list(torch.autograd.grad(out, (attn, value, *weights, *norms), direction.to(out.dtype)))


def lost(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    """What each gradient errs by; all but the third norm's bias, which is nothing but rounding."""
    pairs = [pair for index, pair in enumerate(zip(ours, truth, strict=True)) if index != BIAS3]
    return [((one.cpu().double() - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize(("heads", "ratio"), [(3, 2), (12, 3)])
def test_the_four_passes_give_every_gradient_of_eager(heads, ratio, device, monkeypatch):
    small_pieces(monkeypatch)
    attn, value, refiner = maps(2, heads, 6), leaf(2, heads, 6, 5), bottleneck(heads, ratio)
    attn, value, direction = (_like(x, torch.float32) for x in (attn, value, torch.randn(2, heads, 6, 5)))
    truth = gradients(attn, value, refiner, direction, "eager")
    attn, value, direction = (x.detach().float().to(device) for x in (attn, value, direction))
    ours = chained(attn, value, refiner, direction)
    assert max(lost(ours, truth)) < 1e-5


def test_in_half_precision_they_lose_no_more_than_the_tiled_backend(device, monkeypatch):
    """Averaged over draws: in one draw a gate that flips can decide either way. The interpreter rounds float16."""
    small_pieces(monkeypatch)
    errors = {"triton": torch.zeros(12), "tiled": torch.zeros(12)}
    for _ in range(3):
        attn, value = _like(maps(2, 3, 9), torch.float16), _like(leaf(2, 3, 9, 8), torch.float16)
        refiner, direction = bottleneck(3, 2), torch.randn(2, 3, 9, 8).half()
        truth = gradients(attn, value, refiner, direction.double(), "eager")
        attn, value = _like(attn, to=torch.float16), _like(value, to=torch.float16)
        tiled = gradients(attn, value, refiner, direction, "tiled")
        kernels = chained(attn.to(device), value.to(device), refiner, direction.to(device))
        for backend, ours in (("triton", kernels), ("tiled", tiled)):
            errors[backend] += torch.tensor(lost(ours, truth)) / 3
    assert (errors["triton"] < 1.25 * errors["tiled"]).all(), errors["triton"] / errors["tiled"]
