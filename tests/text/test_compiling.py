"""torch.compile takes whole refined encoders, in training and evaluation, and computes what they compute without it."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForSequenceClassification

from refiner_ds.text import add_refiner
from tests.marks import long_where
from tests.text.encoders import WORDS, encoder, inputs, move_weights

pytestmark = pytest.mark.slow
KEYS = {
    "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2,
    "problem_type": "single_label_classification",  # or the first call sets it, and the second is compiled anew
}  # fmt: skip
# Lengths of sequences by batch. Another longest one makes graphs of any length, which inductor takes a CPU minutes for.
ALIKE, UNLIKE = [(9, 4, 6), (1, 9, 5), (9, 9, 9)], [(9, 4, 6), (7, 5, 7), (12, 1, 3), (8, 8, 8)]


@pytest.fixture(autouse=True)
def nothing_compiled_before(tmp_path, monkeypatch):
    """Code of another version of an operator would be taken from inductor's usual cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def classifier(kind: str) -> torch.nn.Module:
    base = encoder("bert", AutoModelForSequenceClassification, **KEYS)
    model = add_refiner(base, kind, 2, 3, "fresh")
    move_weights(model, 0.02)
    return model


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Word numbers padded to the longest sequence, the mask and labels."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    words = torch.randint(5, WORDS, mask.shape).masked_fill(~mask, 1)
    return {"input_ids": words, "attention_mask": mask.long(), "labels": torch.arange(len(lengths)) % 2}


def difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """The largest over weights and buffers: a refiner's statistics count as its weights do."""
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("backend", "kind"),
    long_where(
        lambda *case: case != ("aot_eager", "linear"),
        [(backend, kind) for backend in ("aot_eager", "inductor") for kind in ("linear", "bottleneck")],
    ),
)
def test_compiled_training_steps_on_ragged_batches_are_those_of_eager(backend, kind):
    model = classifier(kind).train()
    begun, twin = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, twin)]
    batches, graphs = (ALIKE, 1) if backend == "inductor" else (UNLIKE, 2)
    for lengths in batches:
        given, losses = batch(lengths), []
        for one, optimizer in zip((model, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(one(**given).loss)
            losses[-1].backward()
            optimizer.step()
        assert abs(losses[0] - losses[1]) < 1e-12
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    )  # the first length's, and that of all others
    assert difference(model, twin) < 1e-12 < 1e-3 < difference(model, begun)


@pytest.mark.parametrize("backend", long_where(lambda backend: backend == "inductor", ["aot_eager", "inductor"]))
def test_a_compiled_encoder_in_evaluation_is_the_same(backend):
    model = classifier("linear").eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    given, _ = inputs("bert")
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=1e-12, atol=1e-12)
