"""Statistics of maps have the values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from refiner_ds.analysis.map_statistics import (
    attention_distance,
    attention_entropy,
    head_similarity,
    token_similarity,
)


def test_entropy_is_zero_for_one_key_and_log_n_for_all_alike() -> None:
    one_key, alike = torch.eye(5), torch.full((5, 5), 0.2)
    maps = torch.stack((one_key, alike, -3 * alike, torch.zeros(5, 5)))[None]
    assert attention_entropy(maps).tolist() == pytest.approx([0, math.log(5), math.log(5), 0])


def test_distance_counts_patches_and_leaves_class_tokens_out() -> None:
    looks_right = torch.zeros(7, 7)
    looks_right[:, 0] = 9  # the class token's column
    for row in range(2):
        for column in range(3):
            looks_right[1 + 3 * row + column, 1 + 3 * row + (column + 1) % 3] = 0.5
    at_itself = torch.eye(7)
    distances = attention_distance(torch.stack((looks_right, at_itself))[None], (2, 3))
    assert distances.tolist() == pytest.approx([(1 + 1 + 2) / 3, 0])
    with pytest.raises(ValueError, match="7 tokens"):
        attention_distance(looks_right[None, None], (3, 3))


def test_similarity_is_the_mean_cosine_over_pairs() -> None:
    maps = torch.rand(3, 4, 6, 6)
    flat = maps.flatten(2)
    expected = [
        F.cosine_similarity(flat[b, i], flat[b, j], dim=0).item() for b in range(3) for i in range(4) for j in range(i)
    ]
    assert head_similarity(maps) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert head_similarity(maps[:, :1].expand(-1, 4, -1, -1)) == pytest.approx(1)
    assert token_similarity(torch.eye(4)[None]) == pytest.approx(0)
    assert token_similarity(torch.zeros(1, 4, 3)) == 0
