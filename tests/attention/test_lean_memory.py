"""What the lean way keeps for backward, counted by autograd's own hooks: as its formulas say, and small.

Counts are of one more image, since what does not grow with the batch is a matter of weights.
"""

from __future__ import annotations

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import Scores
from refiner_ds.benchmark.measure import kept_bytes
from tests.attention.cases import SCALE, bottleneck, leaf, linear

HEADS, TOKENS, WIDTH, RATIO = 12, 50, 32, 3
ENTRIES = HEADS * TOKENS**2  # h, for one image
VECTORS = HEADS * TOKENS * WIDTH


def per_image(forward) -> float:
    """Bytes kept for one more image."""
    return kept_bytes(lambda: forward(3), torch.nn.Module()) - kept_bytes(lambda: forward(2), torch.nn.Module())


@pytest.mark.parametrize(("keep", "map_bytes"), [("map", 2), ("stacks", 2 + 2 * RATIO + 2)])
def test_a_bottleneck_keeps_two_or_ten_bytes_an_entry(keep, map_bytes):
    refiner = bottleneck(HEADS, RATIO)

    def forward(batch):
        attn = torch.rand(batch, HEADS, TOKENS, TOKENS).bfloat16().requires_grad_()
        value = leaf(batch, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            return attention.refine(attn, value, refiner, SCALE, way="lean", keep=keep)

    assert per_image(forward) == map_bytes * ENTRIES + 2 * VECTORS


def test_a_linear_refiner_keeps_no_map():
    refiner = linear(HEADS, RATIO)

    def forward(batch):
        q, k, v = (leaf(batch, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(3))
        return attention.refine(Scores(q, k, SCALE), v, refiner, way="lean")

    assert per_image(forward) == 3 * 2 * VECTORS + 4 * HEADS * TOKENS


def test_a_map_making_block_keeps_one_map():
    def forward(batch):
        q, k, v = (leaf(batch, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(3))
        handed = torch.rand(batch, HEADS, TOKENS, TOKENS).bfloat16().requires_grad_()
        return attention.attend(Scores(q, k, SCALE), v, handed, way="lean")

    assert per_image(forward) == 2 * ENTRIES + 3 * 2 * VECTORS + 4 * HEADS * TOKENS
