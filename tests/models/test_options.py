"""Every variant builds and runs; what cannot be built is refused in one sentence; randomness is torch's alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch

from refiner_ds.models import NO_BOX, draw_mix_box
from tests.models.small import BOX, PAPER, RELEASED, VARIANTS, pictures, small_model

CLASSES, PATCHES, HEADS, TOKENS = 5, 16, 2, 17


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_what_training_and_evaluation_expect(variant):
    model = small_model(**VARIANTS[variant])
    class_logits, patch_logits, box = model.train()(pictures(), BOX)
    assert class_logits.shape == (4, CLASSES) and patch_logits.shape == (4, PATCHES, CLASSES) and box == BOX
    logits = model.eval()(pictures())
    tokens = model.forward_features(pictures())
    expected = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).max(1).values
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_maps_are_those_that_multiply_the_values(variant):
    model = small_model(**VARIANTS[variant])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    maps = model.train().attention_maps(pictures())
    expanded = 3 * HEADS if variant == "paper-no-reduction" else HEADS
    assert [tuple(one.shape) for one in maps] == [(4, expanded, TOKENS, TOKENS)] * 4
    assert model.training and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    if variant in ("plain", "plain-released"):
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(4, HEADS, TOKENS))
    attn = model.eval().blocks[0].attn
    x_BND = model.blocks[0].norm1(model._embed(pictures(), NO_BOX) / model.blocks[0].gain)
    value_BHNd = attn._heads(x_BND)[-1].repeat_interleave(expanded // HEADS, 1)
    joined = attn.proj((maps[0] @ value_BHNd).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x_BND, None)[0], joined, rtol=1e-5, atol=1e-5)
    unrefined = model.attention_maps(pictures(), refined=False)
    assert [tuple(one.shape) for one in unrefined] == [(4, HEADS, TOKENS, TOKENS)] * 4
    for block, own, used in zip(model.blocks, unrefined, maps, strict=True):
        if type(block.attn).__name__ in ("PlainAttention", "MapAttention"):
            assert torch.equal(own, used)
        else:  # its rows are those of softmax, and of the residual map where there is one
            assert own.min() >= 0 and not (own.shape == used.shape and torch.equal(own, used))
    # Further on, what a block hands on and puts out must not depend on whether its map is kept.
    tokens_BND, residual_BHNN = model._embed(pictures(), NO_BOX), None
    for block in model.blocks:
        tokens_BND, residual_BHNN, _ = block.forward_with_map(tokens_BND, residual_BHNN)
    torch.testing.assert_close(model.norm(tokens_BND), model.forward_features(pictures()), rtol=1e-5, atol=1e-5)


def test_released_blocks_alternate_and_share_maps():
    model = small_model(**RELEASED)
    kinds = [type(block.attn).__name__ for block in model.blocks]
    assert kinds == ["MapAttention", "SharedAttention"] * 2
    residual = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: residual.append(out[1]))
    model(pictures())
    assert torch.equal(residual[0], residual[1]) and torch.equal(residual[2], residual[3])
    assert not torch.equal(residual[1], residual[2])
    # residual maps: the second pair's rows hold a row of the first's, scaled by 1/√d, on top of a softmax
    torch.testing.assert_close(residual[2].sum(-1), 1 + residual[0].sum(-1) * 12**-0.5)


def test_mixed_patches_come_from_the_batch_in_reverse_and_are_flipped_back():
    model = small_model(**VARIANTS["plain"])
    x = pictures()
    whole = (0, 0, *model.patch_grid)
    # A box over the whole grid swaps every patch: the patch logits, flipped back, are those of the flipped batch.
    plain = model.train()(x.flip(0), NO_BOX)
    mixed = model.train()(x, whole)
    torch.testing.assert_close(mixed[1], plain[1].flip(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-5)
    part = model(x, BOX)[1]
    assert part.isfinite().all() and not torch.equal(part, mixed[1])


def test_a_box_is_drawn_only_where_mix_token_asks_for_it():
    off, on = small_model(**RELEASED), small_model(**RELEASED, mix_token=True)
    assert off.train()(pictures())[2] == NO_BOX
    torch.manual_seed(3)
    boxes = {on.train()(pictures())[2] for _ in range(20)}
    torch.manual_seed(3)
    assert boxes == {draw_mix_box(on.patch_grid) for _ in range(20)}
    assert len(boxes) > 3
    assert on.eval()(pictures()).shape == (4, CLASSES)


def test_mix_boxes_lie_in_the_grid_and_take_the_area_they_should():
    generator = torch.Generator().manual_seed(0)
    boxes = [draw_mix_box((14, 10), generator) for _ in range(4000)]
    assert all(0 <= y0 <= y1 <= 14 and 0 <= x0 <= x1 <= 10 for y0, x0, y1, x1 in boxes)
    share = sum((y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in boxes) / (4000 * 140)
    assert 0.25 < share < 0.4  # a mean of one half, less what is clipped and rounded down
    again = torch.Generator().manual_seed(0)
    assert boxes == [draw_mix_box((14, 10), again) for _ in range(4000)]


def test_small_pictures_and_patches_work():
    model = timm.create_model("refined_vit", img_size=28, patch_size=4, stem_chs=(8, 16, 16), embed_dim=24,
                              num_heads=2, depth=2, num_classes=10)  # fmt: skip
    assert model.patch_grid == (7, 7)
    assert model.eval()(torch.randn(2, 3, 28, 28)).shape == (2, 10)
    wide = timm.create_model("refined_vit", img_size=(16, 32), patch_size=8, embed_dim=24, num_heads=2, depth=1)
    assert wide.patch_grid == (2, 4)


def test_paper_ablation_sizes():
    """Expansion adds 2·r·H² + 9·r·H weights a block, and nothing else differs from the plain ViT."""

    def count(**options) -> int:
        with torch.device("meta"):
            model = timm.create_model("refined_vit", **options)
        return sum(parameter.numel() for parameter in model.parameters())

    plain = count(refiner="none")
    for ratio in (1, 2, 3, 4, 6):
        assert count(expansion_ratio=ratio) - plain == 16 * (2 * ratio * 144 + 9 * ratio * 12)
    assert count(expand=False) - plain == 16 * 9 * 12


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 30}, "img_size 30x30 is not a multiple of patch_size 8; near are 24 and 32"),
        ({"img_size": (32, 32, 32)}, "img_size is (32, 32, 32); it must be one whole number or two, (height, width)"),
        ({"patch_size": 7}, "patch_size is 7; the stem halves the image first, so it must be an even number"),
        ({"patch_size": (8, 8)}, "patch_size is (8, 8); the stem halves the image first, so it must be an even number"),
        ({"num_heads": 5}, "embed_dim 24 is not divisible by num_heads 5; 20 would be"),
        ({"num_heads": 0}, "num_heads is 0; it must be a whole number of at least 1"),
        ({"kernel_size": 2}, "kernel_size is 2; it must be odd, such as 1, 3 or 5"),
        ({"kernel_size": (3, 3)}, "kernel_size is (3, 3); it must be a whole number of at least 1"),
        ({"constraint": "grid"}, "constraint is 'grid'; it must be one of none, spatial, row+col"),
        ({"expansion_ratio": 0.5}, "expansion_ratio is 0.5; it must be 1 or more"),
        ({"expansion_ratio": "3"}, "expansion_ratio is '3'; it must be a number above 0"),
        ({"expansion_ratio": 1.3}, "expansion_ratio 1.3 makes 2.6 maps of 2 heads, no whole number"),
        (
            {"expansion_ratio": 1.5, "reduce": False},
            "without reduction expansion_ratio must be a whole number, not 1.5",
        ),
        ({"refiner": "deep"}, "refiner is 'deep'; it must be one of none, linear, bottleneck"),
        ({"layout": "mine"}, "layout is 'mine'; it must be one of released, paper"),
        ({"depth": 0}, "depth is 0; it must be a whole number of at least 1"),
        ({"depth": 2.0}, "depth is 2.0; it must be a whole number of at least 1"),
        ({"in_chans": 0}, "in_chans is 0; it must be a whole number of at least 1"),
        ({"num_classes": -1}, "num_classes is -1; it must be a whole number of at least 0"),
        ({"mlp_ratio": -2}, "mlp_ratio is -2; it must be a number above 0"),
        ({"mlp_ratio": math.inf}, "mlp_ratio is inf; it must be a number above 0"),
        ({"expansion_ratio": math.inf}, "expansion_ratio is inf; it must be a number above 0"),
        ({"constraint": ["none"]}, "constraint is ['none']; it must be one of none, spatial, row+col"),
        ({"init_values": "x"}, "init_values is 'x'; it must be a number, None for no scale, or 'layout'"),
        ({"init_values": math.nan}, "init_values is nan; it must be a number, None for no scale, or 'layout'"),
        ({"init_values": (1,)}, "init_values is (1,); it must be a number, None for no scale, or 'layout'"),
        ({"cos_reg": math.nan}, "cos_reg is nan; it must be a number of at least 0"),
        ({"qkv_bias": "no"}, "qkv_bias is 'no'; it must be True or False"),
        ({"return_dense": 0}, "return_dense is 0; it must be True or False"),
        ({"img_size": 32.5}, "img_size is 32.5; it must be one whole number or two, (height, width)"),
        ({"img_size": (True, 32)}, "img_size is (True, 32); it must be one whole number or two, (height, width)"),
        ({"stem_chs": (4, 8)}, "stem_chs is (4, 8); it must be three whole numbers above 0, such as (32, 64, 128)"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5; it must be at least 0 and below 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; it must be at least 0 and below 1"),
        ({"attn_drop_rate": -1}, "attn_drop_rate is -1; it must be at least 0 and below 1"),
        ({"proj_drop_rate": float("nan")}, "proj_drop_rate is nan; it must be at least 0 and below 1"),
        ({"drop_rate": "0.1"}, "drop_rate is '0.1'; it must be at least 0 and below 1"),
        ({"global_pool": "avg"}, "global_pool is 'avg'; it must be token"),
        ({"cos_reg": -0.1}, "cos_reg is -0.1; it must be a number of at least 0"),
        ({"cos_reg": 0.1, "cos_reg_pairs": 4}, "cos_reg_pairs is 4; 4 blocks have 1 to 3 neighbouring pairs"),
        ({"cos_reg": 0.1, "depth": 1}, "cos_reg compares neighbouring blocks, but the model has only one"),
        (
            {"refiner": "bottleneck", "expand": False},
            "expand and reduce can be switched off with refiner 'linear' only, not with 'bottleneck'",
        ),
        (
            {"mix_token": True, "return_dense": False},
            "mix_token mixes the labels of patches, which return_dense=False leaves out; switch one off",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError) as refusal:
        small_model(**{**PAPER, **options})
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("shape", [(3, 40, 32), (1, 32, 32), (32, 32)])
def test_images_of_another_size_or_number_of_channels_are_refused(shape):
    got = "x".join(map(str, shape))
    with pytest.raises(
        ValueError, match=f"^images are {got}, but the model takes 3x32x32; set_input_size changes that$"
    ):
        small_model(**PAPER).eval()(torch.randn(1, *shape))


IMPOSSIBLE = [
    (0, 0, 5, 4), (-1, 0, 2, 2), (2, 0, 1, 4), (0, 0, 2), (0.5, 0, 1, 1), (math.nan, 0, 1, 1),
    (None,) * 4, (True,) * 4, 5,
]  # fmt: skip


@pytest.mark.parametrize("box", IMPOSSIBLE)
def test_boxes_outside_the_grid_are_refused(box):
    with pytest.raises(ValueError) as refusal:
        small_model(**PAPER).train()(pictures(), box)
    assert str(refusal.value).startswith(f"mix_box is {box!r}; it must be (y0, x0, y1, x1) within the 4x4 patch grid")


@pytest.mark.parametrize("variant", ["released", "paper", "plain"])
def test_without_the_auxiliary_head_class_logits_come_alone_in_training_and_evaluation(variant):
    model = small_model(**VARIANTS[variant], return_dense=False)
    assert not any("aux_head" in name for name in model.state_dict())
    for mode in (True, False):
        logits = model.train(mode)(pictures())
        assert isinstance(logits, torch.Tensor) and logits.shape == (4, CLASSES)
    torch.nn.functional.cross_entropy(model.train()(pictures()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # DDP demands it
    dense = small_model(**VARIANTS[variant])
    dense.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        tokens = dense.eval().forward_features(pictures())
        torch.testing.assert_close(model.eval()(pictures()), dense.head(tokens[:, 0]))
    with pytest.raises(ValueError, match="return_dense=False leaves out"):
        model.train()(pictures(), BOX)


@pytest.mark.parametrize("box", [torch.tensor(BOX), np.array(BOX), list(BOX), tuple(map(np.int64, BOX))])
def test_a_box_may_be_any_four_whole_numbers(box):
    class_logits, patch_logits, used = small_model(**PAPER).train()(pictures(), box)
    truth = small_model(**PAPER).train()(pictures(), BOX)
    assert torch.equal(class_logits, truth[0]) and torch.equal(patch_logits, truth[1]) and used == BOX


@pytest.mark.parametrize("variant", ["released", "paper-spatial", "paper-row+col", "plain"])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_nothing_and_leaves_statistics_alone(variant, training):
    model = small_model(**VARIANTS[variant], return_dense=False).train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = model(pictures()[:0])
    logits.sum().backward()
    assert logits.shape == (0, CLASSES)
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("method", "arguments", "sentence"),
    [
        ("set_input_size", (None, 0), "patch_size is 0; the stem halves the image first, so it must be an even number"),
        ("set_input_size", (None, (8, 4)), "patch_size is (8, 4); patches are square here: give one number"),
        ("set_input_size", (math.nan,), "img_size is nan; it must be one whole number or two, (height, width)"),
        ("reset_classifier", (-1,), "num_classes is -1; it must be a whole number of at least 0"),
        ("reset_classifier", ("10",), "num_classes is '10'; it must be a whole number of at least 0"),
        ("freeze", ("norm",), "names of parameters are 'norm'; they must be a list, such as ['patch_embed']"),
        ("freeze", (5,), "names of parameters are 5; they must be a list, such as ['patch_embed']"),
        ("freeze", ([5],), "5 names no parameter; it must be a name, a prefix or a pattern of either"),
        ("set_grad_checkpointing", (True, ["pair"]), "unit is ['pair']; it must be one of pair, block, refiner"),
        (
            "prune_intermediate_layers", ([9],),
            "indices is [9]; it must be blocks from -4 to 3, or how many of the last, 1 to 4",
        ),
        (
            "forward_intermediates", (pictures(), "a"),
            "indices is 'a'; it must be blocks from -4 to 3, or how many of the last, 1 to 4",
        ),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused_in_one_sentence_and_change_nothing(method, arguments, sentence):
    model = small_model(**PAPER)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises(ValueError) as refusal:
        getattr(model, method)(*arguments)
    assert str(refusal.value) == sentence
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1]
    assert len(dict(model.named_parameters())) == len(before) and model.num_classes == CLASSES
