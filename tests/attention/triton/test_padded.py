"""Rows of padded maps start at multiples of 16 bytes, zeros after their last entries, whatever was in memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention.bottleneck import triton_backward, triton_backward_local, triton_forward, triton_inference
from refiner_ds.attention.kernels import padded
from refiner_ds.attention.kernels.padded import (
    empty_padded,
    is_padded,
    real_counts,
    row_stride,
    to_padded,
    valid_counts,
)
from tests.attention.cases import SCALE, bottleneck, leaves, on
from tests.marks import long_where

WRITERS = [triton_forward, triton_inference, triton_backward, triton_backward_local, padded]


def behind_rows(padded_BCNN: Tensor) -> Tensor:
    """What lies between the last entry of each row and the next row."""
    batch, maps, tokens, _ = padded_BCNN.shape
    whole = torch.as_strided(padded_BCNN, (batch, maps, tokens, row_stride(tokens)), padded_BCNN.stride())
    return whole[..., tokens:]


@pytest.mark.parametrize("tokens", [1, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_copied_once_and_begins_every_row_at_16_bytes(tokens, dtype, memory_full_of_nan):
    dense_BCNN = torch.randn(2, 3, tokens, tokens).to(dtype)
    padded_BCNN = to_padded(dense_BCNN)
    assert torch.equal(padded_BCNN, dense_BCNN) and not behind_rows(padded_BCNN).any()
    assert (
        to_padded(padded_BCNN) is padded_BCNN and to_padded(padded_BCNN.detach()).data_ptr() == padded_BCNN.data_ptr()
    )
    row_bytes = [padded_BCNN[0, 1, row].data_ptr() % 16 for row in range(tokens)]
    assert row_bytes == [0] * tokens and padded_BCNN.stride(2) - tokens < 8


def test_rows_of_the_same_length_with_something_else_behind_them_are_copied():
    wide = torch.ones(2, 3, 7, 8)
    assert not is_padded(wide[..., :7]) and not behind_rows(to_padded(wide[..., :7])).any()
    plane = to_padded(torch.ones(2, 3, 7, 7))
    assert not is_padded(plane[:1]) and not is_padded(plane.mT) and not is_padded(plane.clone())


def test_entries_are_counted_without_the_zeros():
    for tokens, length in ((7, 16), (8, 16), (13, 64), (5, 1000)):
        plane = empty_padded(torch.zeros(1, 1, tokens, tokens))
        real = torch.zeros(tokens, row_stride(tokens), dtype=torch.int64)
        real[:, : plane.shape[-1]] = 1
        parts = [part.sum().item() for part in real.flatten().split(length)]
        assert valid_counts(tokens, length, torch.device("cpu")).tolist() == parts


def test_real_entries_of_padded_sequences_are_counted_and_the_first_step_with_any_is_found():
    for tokens, length, steps in ((7, 16, 2), (8, 16, 1), (13, 8, 5), (5, 1000, 3)):
        mask_BN = torch.rand(4, tokens) < torch.tensor([[1.0], [0.5], [0.2], [0.0]])
        real = torch.zeros(4, tokens, row_stride(tokens), dtype=torch.int64)
        real[:, :, :tokens] = mask_BN[:, :, None] & mask_BN[:, None]
        counts, firsts = [], []
        for image in real.flatten(1):
            for part in image.split(length * steps):
                found = [bool(step.any()) for step in part.split(length)]
                counts.append(part.sum().item())
                firsts.append(found.index(True) if any(found) else 0)
        counted = real_counts(mask_BN, length, steps)
        assert counted[0].tolist() == counts and counted[1].tolist() == firsts


@pytest.mark.parametrize(
    ("tokens", "save_for_backward"),
    long_where(lambda *case: case in ((7, "map"), (8, "activations")), product([7, 8], ["map", "activations"])),
)
def test_whatever_lies_behind_rows_before_is_zero_after(
    tokens, save_for_backward, device, memory_full_of_nan, monkeypatch
):
    written: list[Tensor] = []

    def noted(*args, **options) -> Tensor:
        written.append(empty_padded(*args, **options))
        return written[-1]

    for module in WRITERS:
        monkeypatch.setattr(module, "empty_padded", noted)
    refiner = on(device, bottleneck(3, 3))
    attn = torch.rand(2, 3, tokens, tokens, device=device).requires_grad_()
    value = torch.randn(2, 3, tokens, 4, device=device).requires_grad_()
    out = attention.refine(attn, value, refiner, SCALE, "triton", save_for_backward)
    wanted = [attn, value, *leaves(refiner)]
    grads = torch.autograd.grad(out.square().sum(), wanted)
    with torch.no_grad():
        evaluating = on(device, bottleneck(3, 3, training=False))
        evaluated = attention.refine(attn, value, evaluating, SCALE, "triton")
    assert all(x.isfinite().all() for x in (out, evaluated, *grads))
    # A laid out, h2 and h3, and for the way back A again, with A alone kept both others too, ∂T, m2 and ∂A; A and T.
    assert len(written) == (9 if save_for_backward == "activations" else 11)
    assert all(not behind_rows(plane).any() for plane in written)
