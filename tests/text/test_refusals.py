"""What cannot be refined is refused in one sentence that says why."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModel

from refiner_ds.errors import ConfigError
from refiner_ds.text import add_refiner
from tests.text.encoders import KEYS, encoder, inputs

GPT = {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 10}


def built(kind: str, **keys):
    return AutoModel.from_config(AutoConfig.for_model(kind, **keys))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: built("gpt2", **GPT), "GPT2Model is causal, and a refiner cannot be: it convolves maps along queries"),
        (lambda: encoder("bert", is_decoder=True), "BertModel is causal"),
        (lambda: built("deberta-v2", **KEYS), "DebertaV2Model computes attention in code of its own"),
        (lambda: torch.nn.Linear(2, 2), "Linear is no model of transformers; it must be an encoder, such as BERT"),
    ],
    ids=["causal", "decoder", "own attention", "no encoder"],
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


def test_masks_of_more_than_padding():
    words = inputs("bert")[0]["input_ids"]
    seen = torch.ones(len(words), 1, words.shape[1], words.shape[1], dtype=torch.bool)
    with pytest.raises(ConfigError, match="attention_mask has 4 axes; a refiner takes masks of padding"):
        add_refiner(encoder("bert"))(input_ids=words, attention_mask=seen)
    local = built("modernbert", **KEYS, pad_token_id=0, global_attn_every_n_layers=2)
    with pytest.raises(ConfigError, match="this model masks more"):
        add_refiner(local)(input_ids=words)
