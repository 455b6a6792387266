"""What cannot be refined is refused in one sentence that says why."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, T5Config, T5EncoderModel

from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.text import add_refiner
from tests.text.encoders import KEYS, encoder, inputs

GPT = {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 10}
XLNET = {"d_model": 24, "n_layer": 1, "n_head": 3, "d_inner": 32, "vocab_size": 60}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [3, 3], "window_size": 2}


def built(kind: str, **keys):
    return AutoModel.from_config(AutoConfig.for_model(kind, **keys))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: built("gpt2", **GPT), "GPT2Model is causal, and a refiner cannot be: it convolves maps along queries"),
        (lambda: encoder("bert", is_decoder=True), "BertModel is causal"),
        (lambda: built("deberta-v2", **KEYS), "DebertaV2Model computes attention in code of its own"),
        (lambda: built("xlnet", **XLNET), "XLNetModel computes attention in code of its own"),
        (lambda: torch.nn.Linear(2, 2), "Linear is no model of transformers; it must be an encoder, such as BERT"),
        (lambda: built("swin", **SWIN), "SwinModel is no one encoder: its config says no number of heads that all"),
        (lambda: add_refiner(encoder("bert")), "BertModel has refiners already; take a plain model"),
        (lambda: encoder("bert", output_attentions=True), "BertModel: its config says output_attentions, which"),
    ],
    ids=[
        "causal",
        "decoder",
        "own attention",
        "XLNet's",
        "no encoder",
        "heads by stage",
        "refined already",
        "maps by config",
    ],
)
def test_models_that_cannot_be_refined(make, said):
    with pytest.raises(ConfigError, match=said):
        add_refiner(make())


@pytest.mark.parametrize("kind", ["gpt2", "deberta-v2"])
def test_transformers_does_not_build_them_either(kind):
    config = AutoConfig.for_model(kind, **(GPT if kind == "gpt2" else KEYS))
    with pytest.raises(ConfigError, match="is causal|in code of its own"):
        AutoModel.from_config(config, attn_implementation="refiner")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "square"}, "refiner: kind is 'square'; it must be linear or bottleneck"),
        ({"kind": "bottleneck", "init": "identity"}, "a bottleneck's last norm centres the maps"),
        ({"init": "zeros"}, "refiner: init is 'zeros'; it must be identity or fresh"),
        ({"expansion_ratio": 0.5}, r"refiner: expansion_ratio is 0.5; it must be 1 or more"),
        ({"expansion_ratio": 1.5}, r"refiner: expansion_ratio 1.5 makes 4.5 maps of 3 heads, no whole number"),
        ({"expansion_ratio": "3"}, "refiner: expansion_ratio is '3'; it must be a number, such as 3"),
        ({"kernel_size": 2}, "refiner: kernel_size is 2; it must be odd"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said):
        add_refiner(encoder("bert"), **options)


def test_a_config_with_an_unknown_key():
    with pytest.raises(ConfigError, match="refiner: ratio is not a key; there are kind, expansion_ratio, kernel_size"):
        encoder("bert", refiner={"ratio": 3})


def test_an_implementation_set_without_refiners():
    model = encoder("bert")
    model.set_attn_implementation("refiner")
    with pytest.raises(ConfigError, match=r"BertSelfAttention has no refiner; call refiner_ds\.text\.add"):
        model(**inputs("bert")[0])


@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (3, 9, 9), (3, 5)])
def test_masks_that_are_none_of_padding(shape):
    with pytest.raises(ConfigError, match=rf"attention_mask has shape {re.escape(str(list(shape)))}; a refiner takes"):
        add_refiner(encoder("bert"))(**{**inputs("bert")[0], "attention_mask": torch.ones(shape, dtype=torch.long)})


def test_models_that_mask_more_than_padding_or_add_to_logits():
    words = inputs("bert")[0]["input_ids"]
    local = built("modernbert", **KEYS, pad_token_id=0, global_attn_every_n_layers=2)
    with pytest.raises(ConfigError, match="this model masks more"):
        add_refiner(local)(input_ids=words)
    biased = T5EncoderModel(T5Config(d_model=24, num_layers=1, num_heads=3, d_kv=8, d_ff=32, vocab_size=60))
    with pytest.raises(ConfigError, match="T5Attention needs attention to another sequence, a position bias or"):
        add_refiner(biased)(input_ids=words)


@pytest.mark.parametrize(
    ("saved", "asked", "said"),
    [
        (
            {},
            {"expansion_ratio": 2},
            r"its refiners \(expansion_ratio 3\) are not what the config asks for \(kind linear, e",
        ),
        ({}, {"kernel_size": 5}, r"its refiners \(kernel_size 3\) are not what the config asks for"),
        ({}, {"kind": "bottleneck"}, "its refiners are not what the config asks for .kind bottleneck"),
        ({"kind": "bottleneck"}, {}, "its refiners are not what the config asks for .kind linear"),
    ],
)
@pytest.mark.parametrize(("of", "into"), [(AutoModel, AutoModelForMaskedLM), (AutoModelForMaskedLM, AutoModel)])
def test_a_checkpoint_of_other_refiners(saved, asked, said, of, into, tmp_path):
    add_refiner(encoder("bert", of, torch.float32), **saved).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: {said}"):
        into.from_pretrained(tmp_path, refiner=asked)


def test_refiners_of_another_shape_are_begun_anew_where_that_is_asked_for(tmp_path):
    add_refiner(encoder("bert")).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, refiner={"expansion_ratio": 2}, ignore_mismatched_sizes=True)
    assert model.config.refiner == {"expansion_ratio": 2, "kind": "linear", "kernel_size": 3, "init": "identity"}
