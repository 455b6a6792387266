"""Dtypes of results and bytes saved for backward follow from the inputs, not from what the CPU can multiply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from refiner_ds.attention.linear import tiled as linear_tiled
from refiner_ds.benchmark.measure import saved_bytes
from tests.attention.cases import SCALE, bottleneck, in_dtype, leaf, leaves, linear, maps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (2, 3, 9, 5)


def refining(make: Callable[[], tuple], from_map: bool, **options) -> Callable[[torch.dtype], tuple]:
    """A call of ``attention.refine``, and everything in it that wants a gradient."""

    def prepare(dtype: torch.dtype) -> tuple:
        refiner = in_dtype(make(), torch.float32)
        source = maps(*SHAPE[:3]) if from_map else DeferredMap(leaf(*SHAPE), leaf(*SHAPE), SCALE)
        attn, value = in_dtype(source, dtype), in_dtype(leaf(*SHAPE), dtype)
        return lambda: attention.refine(attn, value, refiner, SCALE, backend="tiled", **options), (attn, value, refiner)

    return prepare


def making(dtype: torch.dtype) -> tuple:
    """A call of ``attention.attend``, its output and the map that it makes in one."""
    scores, value = in_dtype(DeferredMap(leaf(*SHAPE), leaf(*SHAPE), SCALE), dtype), in_dtype(leaf(*SHAPE), dtype)
    before = in_dtype(maps(*SHAPE[:3]), dtype)

    def compute() -> Tensor:
        out, map_BHNN = attention.attend(scores, value, before, backend="tiled")
        assert map_BHNN.dtype == dtype
        return out

    return compute, (scores, value, before)


TRAINING = {
    "bottleneck, map": refining(lambda: bottleneck(3, 2), True, save_for_backward="map"),
    "bottleneck, activations": refining(lambda: bottleneck(3, 2), True, save_for_backward="activations"),
    "bottleneck of queries and keys": refining(lambda: bottleneck(3, 2), False),
    "linear": refining(lambda: linear(3, 2), False),
    "linear of a map": refining(lambda: linear(3, 2), True),
    "linear without reduction": refining(lambda: linear(3, 2, reduce=False), False),
    "linear without expansion": refining(lambda: linear(3, 2, expand=False), False),
    "map": making,
}
EVALUATION = {
    "bottleneck": refining(lambda: bottleneck(3, 2, training=False), True),
    "bottleneck of queries and keys": refining(lambda: bottleneck(3, 2, training=False), False),
    "folded": refining(lambda: attention.fold_refiner(bottleneck(3, 2, training=False), SCALE), True),
    "linear": refining(lambda: linear(3, 2), False),
    "map": making,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [0.0, float("inf")])
@pytest.mark.parametrize("case", TRAINING)
def test_training_gives_the_dtype_of_the_values_and_each_leaf_its_own(case, form, dtype, bf16_products, monkeypatch):
    monkeypatch.setattr(linear_tiled, "STEP_COST", form)
    compute, parts = TRAINING[case](dtype)
    out, wanted = compute(), leaves(*parts)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), wanted)
    assert [grad.dtype for grad in grads] == [x.dtype for x in wanted]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation_gives_the_dtype_of_the_values(case, dtype, bf16_products):
    compute, _ = EVALUATION[case](dtype)
    with torch.no_grad():
        out = compute()
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TRAINING)
def test_bytes_saved_for_backward_do_not_depend_on_the_cpu(case, dtype, monkeypatch):
    saved = []
    for multiplies in (True, False):
        monkeypatch.setattr("refiner_ds.attention.tiling.ops.cpu_multiplies_bf16", lambda it=multiplies: it)
        saved.append(saved_bytes(TRAINING[case](dtype)[0], torch.nn.Module()))
    assert saved[0] == saved[1] > 0
