"""The linear refiner in kernels: eager's numbers and gradients, without a map saved or a copy made."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention import Case, DeferredMap, equations, make_map, refined_map
from refiner_ds.attention.kernels.padded import to_padded
from refiner_ds.attention.linear import triton as linear
from refiner_ds.attention.linear import triton_backward, triton_forward
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.cases import SCALE, leaves
from tests.attention.cases import linear as refiner_of
from tests.attention.triton.test_maps import ends_in_zeros
from tests.marks import long_where

# The interpreter cuts the last bits of bf16 off where a GPU rounds: two roundings are one percent.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
WHOLE: dict[str, bool] = {}
MANY_OUT, LOCAL_ALONE = {"reduce": False}, {"expand": False}


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    """Programs that sum up the kernel's gradient see one row tile each."""
    monkeypatch.setattr(triton_backward, "STEPS", 1)


def projected(batch, heads, tokens, width, dtype, device) -> list[torch.Tensor]:
    """Queries, keys and values as slices of one projection, as blocks have them."""
    together = torch.randn(batch, tokens, 3, heads, width, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    return [part.detach().requires_grad_() for part in together]


def converted(part, dtype, device):
    """The same refiner, scores or tensor as leaves of another precision."""
    if isinstance(part, torch.Tensor):
        return part.detach().to(device, dtype).requires_grad_()
    if isinstance(part, tuple):
        found = [converted(x, dtype, device) for x in part]
        return type(part)(*found) if hasattr(part, "_fields") else tuple(found)
    return part


def results(out: torch.Tensor, inputs: list[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor]:
    """The output with heads joined, as blocks go on, and gradients."""
    joined = out.transpose(1, 2).flatten(2)
    return [joined.detach(), *torch.autograd.grad(joined, inputs, direction.to(out.dtype))]


def check(attn, value, refiner, dtype, device) -> None:
    """Compare values and every gradient with float64, on what is stored."""
    truth_of = [converted(part, torch.float64, device) for part in (attn, value, refiner)]
    map_BHNN = make_map(truth_of[0]) if isinstance(attn, DeferredMap) else truth_of[0]
    truth_out = equations.attend(refined_map(map_BHNN, truth_of[2], 0.7), truth_of[1])
    out = linear.refine(Case(attn, value, refiner), 0.7, "auto")
    assert out.shape == truth_out.shape and out.dtype == dtype
    direction = torch.randn_like(out.transpose(1, 2).flatten(2))
    ours = results(out, leaves(attn, value, refiner), direction)
    truth = results(truth_out, leaves(*truth_of), direction)
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(ours, truth, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize(
    ("shape", "ratio", "kernel_size", "steps", "dtype"),
    long_where(
        lambda shape, ratio, kernel_size, steps, dtype: dtype == torch.float32 and steps is WHOLE and ratio != 1,
        [
            ((2, 3, 18, 5), 2, 3, WHOLE, torch.float32),
            ((1, 3, 17, 5), 2, 3, WHOLE, torch.bfloat16),
            ((1, 12, 9, 32), 3, 3, WHOLE, torch.float32),
            ((1, 12, 9, 32), 3, 3, WHOLE, torch.bfloat16),
            ((1, 17, 5, 5), 1, 3, WHOLE, torch.float32),
            ((1, 16, 17, 35), 2, 1, WHOLE, torch.bfloat16),
            ((1, 3, 7, 5), 6, 3, MANY_OUT, torch.bfloat16),
            ((2, 3, 7, 5), 1, 3, LOCAL_ALONE, torch.float32),
        ],
    ),
)
def test_values_and_gradients_equal_eager(shape, ratio, kernel_size, steps, dtype, device):
    q, k, v = projected(*shape, dtype, device)
    refiner = converted(refiner_of(shape[1], ratio, kernel_size, **steps), torch.float32, device)
    check(DeferredMap(q, k, SCALE), v, refiner, dtype, device)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_given_map_gets_its_gradient(dtype, device):
    v = projected(1, 3, 9, 5, dtype, device)[2]
    given = torch.randn(1, 3, 9, 9, device=device).mul(2).softmax(-1).to(dtype).requires_grad_()
    check(given, v, converted(refiner_of(3, 2), torch.float32, device), dtype, device)


def test_wide_heads_are_worked_in_slices(device, monkeypatch):
    monkeypatch.setattr(triton_forward, "WIDEST", {2: 16, 4: 16})
    monkeypatch.setattr(triton_backward, "WIDEST", {2: 16, 4: 16})
    q, k, v = projected(1, 3, 9, 35, torch.bfloat16, device)
    refiner = converted(refiner_of(3, 2), torch.float32, device)
    check(DeferredMap(q, k, SCALE), v, refiner, torch.bfloat16, device)


def test_maps_may_lie_anywhere(device):
    """Rows padded to where a GPU reads them in large pieces, or columns first, are the same maps."""
    map_BHNN = torch.rand(1, 3, 19, 19, device=device)
    padded_BHNN = torch.full((1, 3, 19, 32), torch.nan, device=device)[..., :19].copy_(map_BHNN)
    value, kernel = torch.randn(1, 3, 19, 5, device=device), torch.randn(3, 3, 3, 3, device=device)
    out = triton_forward.refined_attend(map_BHNN, value, kernel)
    d_kernel = triton_backward.kernel_gradient(map_BHNN, value, value, 3)
    for other_BHNN in (padded_BHNN, map_BHNN.mT.contiguous().mT):
        assert torch.equal(triton_forward.refined_attend(other_BHNN, value, kernel), out)
        assert torch.equal(triton_backward.kernel_gradient(other_BHNN, value, value, 3), d_kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [1, 3])
def test_rows_and_keys_of_a_stack_change_names_where_it_lies(taps, dtype, device):
    transposed = to_padded(torch.rand(1, 3, 35, 35, device=device).to(dtype)).mT
    value, kernel = torch.randn(1, 3, 35, 5, device=device).to(dtype), torch.randn(3, 3, taps, taps, device=device)
    out = triton_forward.refined_attend(transposed, value, kernel, torch.float32)
    torch.testing.assert_close(
        out, triton_forward.refined_attend(transposed.contiguous(), value, kernel, torch.float32)
    )


@pytest.mark.parametrize(("tokens", "maps"), [(9, 3), (8, 3), (9, 17)])
def test_the_gradient_of_maps_lies_with_zeros_behind_rows(tokens, maps, device, memory_full_of_nan):
    grad, value = (torch.randn(2, heads, tokens, 5, device=device) for heads in (maps, 1))
    assert ends_in_zeros(triton_backward.map_gradient(grad, value, torch.randn(maps, 3, 3, 3, device=device)))


def test_joining_heads_copies_nothing(device):
    q, k, v = projected(2, 3, 7, 5, torch.float32, device)
    weights = converted(refiner_of(3, 1), torch.float32, device)
    out = linear.refine(Case(DeferredMap(q, k, SCALE), v, weights), 1.0, "auto").detach()
    joined = out.transpose(1, 2).reshape(2, 7, 15)
    assert joined.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def test_no_map_is_saved(device):
    heads, tokens, width = 3, 20, 8
    refiner = converted(refiner_of(heads, 2), torch.float32, device)

    def forward(batch):
        q, k, v = projected(batch, heads, tokens, width, torch.bfloat16, device)
        with torch.autocast(device.type, torch.bfloat16):
            return linear.refine(Case(DeferredMap(q, k, SCALE), v, refiner), 1.0, "auto")

    kept = [saved_bytes(lambda batch=batch: forward(batch), torch.nn.Module()) for batch in (1, 2)]
    assert kept[1] - kept[0] == 3 * 2 * heads * tokens * width + 4 * heads * tokens


def test_dropout_drops_entries_of_the_map_and_repeats_them_in_backward(device):
    """Out is linear in the values, so its gradient tells which map was used: the same one as forward."""
    q, k = projected(2, 3, 9, 5, torch.float32, device)[:2]
    refiner = converted(refiner_of(3, 1, 1, expand=False), torch.float32, device)
    value = torch.eye(9, device=device).expand(2, 3, 9, 9).clone().requires_grad_()
    refined = linear.refine(
        Case(DeferredMap(q, k, SCALE, 0.5), value, refiner), 1.0, "auto"
    )  # times identity: the map itself
    assert 0.3 < (refined == 0).double().mean() < 0.7
    direction = torch.randn_like(refined)
    (gradient,) = torch.autograd.grad(refined, value, direction)
    torch.testing.assert_close(gradient, refined.detach().mT @ direction)


def test_the_kernel_is_composed_exactly_under_autocast(device):
    refiner = refiner_of(3, 2)
    single = converted(refiner, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        kernel = linear.dense_kernel(single, 0.5)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel.double().cpu(), linear.dense_kernel(refiner, 0.5), rtol=1e-5, atol=1e-5)


def test_weights_lose_no_digits_beside_maps_in_half_precision(device):
    map_BHNN = torch.rand(1, 3, 9, 9, device=device).bfloat16()
    value, kernel = torch.randn(1, 3, 9, 5, device=device), torch.randn(3, 3, 3, 3, device=device)
    truth = equations.refined_by_shifts(map_BHNN.double(), kernel.double(), value.double())
    out = triton_forward.refined_attend(map_BHNN, value, kernel)
    assert ((out.double() - truth).norm() / truth.norm()).item() < 2e-5
