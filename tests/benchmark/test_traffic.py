"""Bytes moved are those of the tensors that operations read and write, and no more."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention import equations
from refiner_ds.benchmark.traffic import moved_bytes

X, Y = torch.ones(10, 100), torch.ones(10, 100)
SIZE = 4 * 10 * 100


@pytest.mark.parametrize(
    ("step", "moved"),
    [
        (lambda: X + Y, 3 * SIZE),
        (lambda: X.add_(Y), 3 * SIZE),
        (lambda: X.copy_(Y), 2 * SIZE),
        (lambda: X.zero_(), SIZE),
        (lambda: X.sum(), SIZE + 4),
        (lambda: X.T.reshape(100, 10)[5:], 0),
        (lambda: torch.empty_like(X).view(-1), 0),
        (lambda: X + Y[:1].expand(10, 100), 2 * SIZE + SIZE // 10),
        (lambda: X.bfloat16(), SIZE + SIZE // 2),
        (lambda: torch.cat([X, Y]), 4 * SIZE),
    ],
)
def test_operations_move_what_they_read_and_write(step, moved):
    assert moved_bytes(step).all == moved


def test_backward_counts_too():
    x = torch.ones(1000, requires_grad=True)
    forward = moved_bytes(lambda: (x * 2).sum()).all
    assert forward == 3 * 4000 + 4
    assert moved_bytes(lambda: (x * 2).sum().backward()).all >= forward + 4000


def test_far_is_what_lies_in_large_storages_even_where_little_of_it_is_read():
    large, small = torch.ones(100, 100), torch.ones(100)
    moved = moved_bytes(lambda: large[3] * small, cache_bytes=1000)
    assert moved.all == 3 * 400 and moved.uncached == 400


def test_a_plain_expansion_moves_its_maps_once():
    maps, weight = torch.ones(2, 3, 8, 8), torch.ones(6, 3)
    assert moved_bytes(lambda: equations.expand(maps, weight)).all == 4 * (maps.numel() * 3 + weight.numel())
