"""Unmodified encoders of transformers are refined, padding or none, and are what they were where nothing is refined."""

from __future__ import annotations

import copy

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention.dispatch import EAGER

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from refiner_ds.text import add_refiner
from refiner_ds.text.refiners import BottleneckRefiner, TextRefiner
from tests.text.encoders import CONFIGS, HEADS, KEYS, LAYERS, LENGTHS, encoder, inputs, move_weights, padded, tokens_of

KINDS = ("linear", "bottleneck")


def refiners_of(model) -> list[TextRefiner]:
    return [module for module in model.modules() if isinstance(module, TextRefiner)]


def refined(kind: str = "linear", base: str = "bert", **more):
    model = add_refiner(encoder(base, **more), kind, 2, 3, "fresh")
    move_weights(model, 0.02)
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_refined_encoder_begins_as_the_plain_one(kind):
    model = encoder(kind)
    given, mask = inputs(kind)
    plain = tokens_of(model, given, mask)
    assert add_refiner(model) is model and len(refiners_of(model)) == LAYERS
    assert (tokens_of(model, given, mask) - plain).abs().max() < 1e-12
    fresh = add_refiner(encoder(kind), init="fresh")
    assert (tokens_of(fresh, given, mask) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("electra", {"embedding_size": 24}),
        ("albert", {"embedding_size": 8}),
        ("esm", {"pad_token_id": 1}),
        ("ernie", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_encoders_that_ask_the_interface_are_refined_and_padded_alike(kind, more):
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**KEYS, **more})).eval().double()
    words, mask = padded()
    given = {"input_ids": words, "attention_mask": mask.long()}
    plain = tokens_of(model, given, mask)
    assert (tokens_of(add_refiner(model), given, mask) - plain).abs().max() < 1e-12
    move_weights(model, 0.02)
    together = model(**given).last_hidden_state
    assert (together[mask] - plain).abs().max() > 1e-3
    for row, length in enumerate(LENGTHS):
        alone = model(input_ids=words[row : row + 1, :length]).last_hidden_state[0]
        assert (together[row, :length] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_map_of_an_identity_has_gradients_from_the_second_step_on(kind):
    model = add_refiner(encoder(kind))
    given, mask = inputs(kind)
    rates = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        rates.zero_grad()
        tokens_of(model, given, mask).pow(3).sum().backward()
        rates.step()
    for refiner in refiners_of(model):
        assert (refiner.expand.grad.abs().sum(1) > 0).all() and (refiner.reduce.grad.abs().sum(0) > 0).all()
        assert (refiner.kernel.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("refiner", KINDS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_sequence_alone_equals_itself_padded(kind, refiner, backend):
    model = refined(refiner, kind)
    words, mask = padded()
    with attention.attention_backend(backend):
        together = model(input_ids=words, attention_mask=mask.long()).last_hidden_state
        for row, length in enumerate(LENGTHS):
            alone = model(input_ids=words[row : row + 1, :length]).last_hidden_state[0]
            assert (together[row, :length] - alone).abs().max() < 1e-12


def test_a_bottleneck_trains_on_padded_batches_by_kernels_as_by_the_equations():
    launch = pytest.importorskip("refiner_ds.attention.kernels.launch", exc_type=ImportError)
    if not launch.INTERPRETED:
        pytest.skip("kernels take float64 in the interpreter alone")
    model = refined("bottleneck", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    given, mask = inputs("bert")
    before, results = {name: x.clone() for name, x in model.state_dict().items()}, []
    for backend in ("triton", "eager"):
        model.load_state_dict(before)
        model.zero_grad()
        with attention.attention_backend(backend):
            out = tokens_of(model, given, mask)
            out.pow(3).sum().backward()
            assert "bottleneck" not in attention.describe_backend(torch.device("cpu"))
        weights = [x for x in model.parameters() if x.grad is not None]
        results.append([out.detach(), *(x.grad.clone() for x in weights), *(x.clone() for x in model.buffers())])
    for ours, truth in zip(*results, strict=True):
        assert (ours - truth).abs().max() < 1e-11 * max(truth.abs().max(), 1)


@pytest.mark.parametrize("refiner", KINDS)
def test_transformers_builds_saves_and_loads_refined_models(refiner, tmp_path):
    model = add_refiner(encoder("bert", AutoModelForSequenceClassification), refiner, 2, 5).train()
    given, mask = inputs("bert")
    model(**given).logits.sum().backward()  # norms have counted
    move_weights(model)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.config.refiner == model.config.refiner and again.config.refiner["kernel_size"] == 5
    base = AutoModel.from_pretrained(tmp_path).eval()  # without the classifier
    assert torch.equal(tokens_of(base, given, mask), tokens_of(again.bert, given, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loaded_or_built_in_half_precision_keeps_statistics_in_fp32(dtype, tmp_path):
    model = refined("bottleneck", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    given, mask = inputs("bert", torch.float32)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    rounded, exact = tokens_of(half, given, mask), tokens_of(model, given, mask)
    assert rounded.dtype == dtype and (rounded - exact).norm() / exact.norm() < 0.05
    for ours, theirs in zip(half.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    built = AutoModel.from_config(model.config, dtype=dtype)
    for one in (half, built):
        statistics = {buffer.dtype for name, buffer in one.named_buffers() if "running" in name}
        assert statistics == {torch.float32} and {weight.dtype for weight in one.parameters()} == {dtype}


def test_shards_of_safetensors_are_loaded_again(tmp_path):
    model = refined()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    given, mask = inputs("bert")
    assert torch.equal(
        tokens_of(AutoModel.from_pretrained(tmp_path).eval(), given, mask), tokens_of(model, given, mask)
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_attention_implementation_refines_a_plain_checkpoint(kind, tmp_path):
    plain = encoder(kind)
    plain.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="refiner").eval()
    given, mask = inputs(kind)
    assert len(refiners_of(model)) == LAYERS
    assert (tokens_of(model, given, mask) - tokens_of(plain, given, mask)).abs().max() < 1e-12
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation != "refiner"


def test_a_refined_model_is_built_from_its_config():
    keys = {"kind": "bottleneck", "expansion_ratio": 1}
    model = encoder("bert", dtype=torch.float32, refiner=keys)
    assert all(isinstance(one, BottleneckRefiner) and one.norm1.weight.eq(1).all() for one in refiners_of(model))
    assert len(refiners_of(model)) == LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("refiner", KINDS)
def test_gradient_checkpointing_changes_no_gradient_and_counts_norms_once(refiner, reentrant):
    model = refined(refiner, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given, mask = inputs("bert")
    for one in (model, twin):
        one.enable_input_require_grads()  # reentrant checkpoints need it
        tokens_of(one, given, mask).pow(2).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is None or (ours.grad - theirs.grad).abs().max() < 1e-12, name
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    if refiner == "bottleneck":
        assert {int(one.norm1.num_batches_tracked) for one in refiners_of(twin)} == {1}


@pytest.mark.parametrize("refiner", KINDS)
def test_autocast_stays_close_and_keeps_weights_in_fp32(refiner):
    model = refined(refiner, dtype=torch.float32)
    given, mask = inputs("bert", torch.float32)
    exact = tokens_of(model, given, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokens_of(model, given, mask)
    assert (rounded - exact).norm() / exact.norm() < 0.05
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_maps_are_returned_where_they_are_asked_for():
    model = refined(attention_probs_dropout_prob=0.0)
    words, mask = padded()
    maps = model(input_ids=words, attention_mask=mask.long(), output_attentions=True).attentions
    assert [tuple(one.shape) for one in maps] == [(len(LENGTHS), HEADS, max(LENGTHS), max(LENGTHS))] * LAYERS
    assert not maps[0].movedim(1, 3)[~(mask[:, :, None] & mask[:, None])].any()
    assert model(input_ids=words, attention_mask=mask.long()).attentions is None


def test_the_operator_computes_it(monkeypatch):
    calls = []
    computed = EAGER.refine
    monkeypatch.setattr(EAGER, "refine", lambda *call: calls.append(call) or computed(*call))
    with attention.attention_backend("eager"):
        refined()(**inputs("bert")[0])
    assert len(calls) == LAYERS and all(case.mask_BN is not None for case, *_ in calls)
