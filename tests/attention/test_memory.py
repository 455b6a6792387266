"""What the tiled backend keeps for backward, counted by autograd's own hooks: as its formulas say, and small.

Counts are of one more image, since what does not grow with the batch is a matter of weights. A network's is exact from
few blocks: all its pairs of blocks are alike, so two depths tell a pair from the rest.
"""

from __future__ import annotations

import pytest
import timm
import torch

import refiner_ds.models  # noqa: F401  registers the models with timm
from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.cases import SCALE, bottleneck, leaf, linear

HEADS, TOKENS, WIDTH, RATIO = 12, 50, 32, 3
ENTRIES = HEADS * TOKENS**2  # h, for one image
VECTORS = HEADS * TOKENS * WIDTH
MIB = 2**20


def per_image(forward) -> float:
    """Bytes kept for one more image."""
    return saved_bytes(lambda: forward(3), torch.nn.Module()) - saved_bytes(lambda: forward(2), torch.nn.Module())


@pytest.mark.parametrize(("save_for_backward", "map_bytes"), [("map", 2), ("activations", 2 + 2 * RATIO + 2)])
def test_a_bottleneck_saves_two_or_ten_bytes_an_entry(save_for_backward, map_bytes):
    refiner = bottleneck(HEADS, RATIO)

    def forward(batch):
        attn = torch.rand(batch, HEADS, TOKENS, TOKENS).bfloat16().requires_grad_()
        value = leaf(batch, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            return attention.refine(attn, value, refiner, SCALE, backend="tiled", save_for_backward=save_for_backward)

    assert per_image(forward) == map_bytes * ENTRIES + 2 * VECTORS


def test_a_linear_refiner_saves_no_map():
    refiner = linear(HEADS, RATIO)

    def forward(batch):
        q, k, v = (leaf(batch, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(3))
        return attention.refine(DeferredMap(q, k, SCALE), v, refiner, backend="tiled")

    assert per_image(forward) == 3 * 2 * VECTORS


def test_a_map_making_block_saves_one_map():
    def forward(batch):
        qkv = leaf(batch, TOKENS, 3, HEADS, WIDTH, dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # as a block's projection leaves them
        residual = torch.rand(batch, HEADS, TOKENS, TOKENS).bfloat16().requires_grad_()
        return attention.attend(DeferredMap(q, k, SCALE), v, residual, backend="tiled")

    assert per_image(forward) == 2 * ENTRIES + 3 * 2 * VECTORS


def kept_by_model(name: str, size: int, depth: int, save_for_backward: str, images: int = 1) -> float:
    """MiB kept by a training forward under bf16 autocast, without checkpointing; autocast's copies of weights too."""
    model = timm.create_model(name, img_size=size, depth=depth).train()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.zeros(images, 3, size, size))

    attention.set_save_for_backward(save_for_backward)
    try:
        return saved_bytes(forward, model) / MIB
    finally:
        attention.set_save_for_backward("auto")


def of_one_image(name: str, size: int, depth: int, save_for_backward: str) -> float:
    """MiB kept for one image; what does not grow with images is told by tiny ones, which are cheap."""
    one, two = (kept_by_model(name, 32, depth, save_for_backward, images) for images in (1, 2))
    return kept_by_model(name, size, depth, save_for_backward) - (2 * one - two)


@pytest.mark.parametrize(
    ("name", "size", "save_for_backward", "blocks_mib", "model_mib"),
    [
        ("refiner_vit_s", 224, "map", 39, 55),
        ("refiner_vit_s", 224, "activations", 67, 85),
        ("refiner_vit_l", 448, "map", 0.58 * 1024, 0.65 * 1024),
        ("refiner_vit_l", 448, "activations", 1.77 * 1024, 1.85 * 1024),
    ],
)
def test_released_models_save_little_more_than_plain_ones(
    name, size, save_for_backward, blocks_mib, model_mib, monkeypatch
):
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    two, four = (of_one_image(name, size, depth, save_for_backward) for depth in (2, 4))
    blocks = (16 if name == "refiner_vit_s" else 32) / 2 * (four - two)
    stem_and_heads = two - (four - two)
    total = blocks + stem_and_heads
    print(f"{name} {size} {save_for_backward}: blocks {blocks:.1f} MiB, with stem and heads {total:.1f} MiB")
    assert blocks < blocks_mib
    assert blocks + stem_and_heads < model_mib
