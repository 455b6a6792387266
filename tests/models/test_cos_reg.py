"""cos-reg is the released one: along heads, over the first pairs of blocks, of the maps that blocks pass on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from refiner_ds.attention import attention_backend
from refiner_ds.benchmark.measure import saved_bytes
from refiner_ds.models.cos_reg import neighbour_similarity
from tests.models import golden
from tests.models.small import PAPER, RELEASED, VARIANTS, pictures, small_model

# 0.1 · mean over n pairs for the golden model and its input, by the plain loop below in float64.
GOLDEN = {1: 0.1, 2: 0.098532384, 3: 0.099021589}


def passed_on(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The map every block hands to the next in one training forward, kept by hooks."""
    maps: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, args, out: maps.append(out[1])) for block in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return maps


def plain_penalty(maps: list[Tensor], pairs: int) -> Tensor:
    """The definition written out, in float64: cosine over heads at every (sample, query, key), then means."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(maps[:pairs], maps[1 : pairs + 1], strict=True):
        one, other = one.double(), other.double()
        dot = (one * other).sum(1)
        total = total + (dot / (one.square().sum(1).sqrt() * other.square().sum(1).sqrt())).mean()
    return 0.1 * total / pairs


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("pairs", GOLDEN)
def test_the_penalty_of_the_released_model_is_the_plain_one_on_every_backend(backend, pairs):
    x = golden.tensor("input")
    with attention_backend(backend):
        plain_model = golden.golden_model(cos_reg=0.1, cos_reg_pairs=pairs).train()
        truth = plain_penalty(passed_on(plain_model, x), pairs)
        model = golden.golden_model(cos_reg=0.1, cos_reg_pairs=pairs).train()
        class_logits, patch_logits, _ = model(x)
        penalty = model.cos_reg_loss()
        assert penalty.dtype == torch.float32
        assert penalty.item() == pytest.approx(truth.item(), rel=1e-6)
        assert penalty.item() == pytest.approx(GOLDEN[pairs], rel=1e-5)
        loss = golden.training_loss(class_logits, patch_logits) + penalty
        assert loss.item() == pytest.approx(golden.tensor("train_loss").item() + GOLDEN[pairs], rel=1e-5)
        if pairs == 1:  # blocks 0 and 1 pass on the same map: a constant
            return
        penalty.backward()
        truth.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain_model.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-9:
            assert golden.relative_error(ours.grad, theirs.grad) < 1e-3, name


@pytest.mark.parametrize("variant", ["paper", "paper-bottleneck", "plain", "released-linear", "paper-no-reduction"])
def test_other_layouts_compare_the_maps_that_their_blocks_make(variant):
    model = small_model(**VARIANTS[variant], cos_reg=0.1).train()
    truth = plain_penalty(passed_on(model, pictures()), 3)
    assert model.cos_reg_loss().item() == pytest.approx(truth.item(), rel=1e-5)
    assert truth.item() < 0.1 - 1e-7
    without = small_model(**VARIANTS[variant]).train()
    torch.testing.assert_close(model(pictures())[0], without(pictures())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cosine_and_its_gradients_are_pytorchs(dtype):
    maps = [torch.rand(2, 5, 7, 7).to(dtype).requires_grad_() for _ in range(3)]
    with torch.no_grad():
        maps[1][0, :, 2] = 0  # rows without attention: a norm below eps
    ours = neighbour_similarity(maps, [True, True, False, True], 3)
    exact = [one.detach().double().requires_grad_() for one in maps]
    pairs = [(0, 1), (1, 2)]  # the block between makes no map of its own
    truth = (sum(torch.cosine_similarity(exact[i], exact[k], dim=1).mean() for i, k in pairs) + 1) / 3
    assert ours.item() == pytest.approx(truth.item(), rel=1e-6 if dtype != torch.float64 else 1e-12)
    gradients, wanted = torch.autograd.grad(ours, maps), torch.autograd.grad(truth, exact)
    live = torch.ones(7, dtype=torch.bool)
    live[2] = False
    for one, other in zip(gradients, wanted, strict=True):
        assert one.dtype == dtype and one.isfinite().all()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert golden.relative_error(one[:, :, live], other[:, :, live]) < tolerance


def test_second_derivatives_of_the_cosine_are_right():
    maps = [torch.rand(1, 3, 2, 2).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda *maps: neighbour_similarity(list(maps), [True, True], 1), maps)


def test_the_penalty_saves_nothing_but_what_is_saved_anyway():
    def saved(**options) -> int:
        model = small_model(**RELEASED, **options).train()
        return saved_bytes(lambda: model(pictures())[0].sum() + (model.cos_reg_loss() if options else 0), model)

    assert saved(cos_reg=0.1) - saved() < 100  # a few scalars


def test_the_penalty_is_given_out_once_and_leaves_no_graph_behind():
    model = small_model(**RELEASED, cos_reg=0.1).train()
    model(pictures())
    again = copy.deepcopy(model)  # while a penalty waits
    assert pickle.loads(pickle.dumps(model)).cos_reg == 0.1
    assert model.cos_reg_loss().requires_grad
    for without in (model, again, small_model(**PAPER)):
        with pytest.raises(ValueError, match=r"^there is no cos-reg penalty: create the model with cos_reg=0\.1"):
            without.cos_reg_loss()
    model(pictures())
    model.eval()(pictures())
    with pytest.raises(ValueError, match="there is no cos-reg penalty"):
        model.cos_reg_loss()
