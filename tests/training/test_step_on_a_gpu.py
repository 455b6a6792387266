"""The forward parts of a step on a GPU that is not there: fake tensors know devices and shapes, and no number.

A tensor left on the CPU, or a number that is asked of the device, is an error here as it would be, or would wait,
there. Backward needs a real device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from refiner_ds import attention
from refiner_ds.attention import saving
from refiner_ds.config import load
from refiner_ds.data import normalize
from refiner_ds.data.batch import Batch, MapBatch
from refiner_ds.training import inputs
from refiner_ds.training.build import build_model
from refiner_ds.training.engine import build_optimizer
from refiner_ds.training.inputs import InputMaker
from refiner_ds.training.losses import class_loss, token_label_loss

CUDA = torch.device("cuda", 0)
SMALL = ("embed_dim=16", "num_heads=2", "depth=4", "stem_chs=[4,4,4]", "drop_path=0.1", "cos_reg=0.5")
CLASSES, IMAGES = 10, 6


@pytest.fixture(autouse=True)
def numbers_of_the_host_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn for a whole batch is drawn on the host; the GPU has 80 GiB."""

    def real(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*given: Any) -> Any:
            with unset_fake_temporarily():
                return draw(*given)

        return drawn

    monkeypatch.setattr(saving, "_assumed_bytes", 80 << 30)
    for name in ("draw_mix", "draw_mix_box"):
        monkeypatch.setattr(inputs, name, real(getattr(inputs, name)))


@pytest.fixture(autouse=True)
def no_fake_number_is_kept() -> Iterator[None]:
    normalize._affine.cache_clear()
    yield
    normalize._affine.cache_clear()


def there(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model with all its tensors on the GPU, in the mode that is entered."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=CUDA))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return model


def batch(maps: bool) -> Batch:
    with CUDA:
        return _batch(maps)


def _batch(maps: bool) -> Batch:
    record = MapBatch(
        torch.empty(IMAGES, 5, 7, 7, dtype=torch.float16), torch.empty(IMAGES, 5, 7, 7, dtype=torch.int16),
        torch.empty(IMAGES, 2, 2, 3),
    )  # fmt: skip
    whole = torch.empty(IMAGES, dtype=torch.int64)
    images = torch.empty(IMAGES, 28, 28, 3, dtype=torch.uint8)
    return Batch(images, whole, whole, torch.empty(IMAGES, dtype=torch.bool), maps=record if maps else None)


MIXINGS = {
    "mix-token": (),
    "mixup": ("refiner.recipe.mixup=0.8", "refiner.recipe.mix_probability=1"),
    "cutmix": ("refiner.recipe.cutmix=1.0", "refiner.recipe.mix_probability=1", "refiner.recipe.mix_token=false"),
    "class head alone": ("refiner.model.return_dense=false", "refiner.recipe.mix_token=false"),
}


def test_the_optimizer_is_the_fused_one_on_a_gpu_and_not_on_a_cpu() -> None:
    run = load(None, [f"refiner.model.{key}" for key in SMALL])
    model = build_model(run, CLASSES)
    assert not build_optimizer(run, model).defaults["fused"]
    with FakeTensorMode():
        assert build_optimizer(run, there(model, torch.float32)).defaults["fused"]


CASES = [
    ("tiled", "mix-token", True), ("triton", "mix-token", True), ("eager", "mix-token", False),
    ("tiled", "cutmix", True), ("tiled", "mixup", False), ("tiled", "cutmix", False),
    ("tiled", "class head alone", False),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "mixing", "maps"), CASES)
def test_inputs_model_and_loss_stay_on_the_gpu_and_read_nothing_back(backend: str, mixing: str, maps: bool) -> None:
    keys = [*(f"refiner.model.{key}" for key in SMALL), *MIXINGS[mixing]]
    run = load(None, keys)
    model = build_model(run, CLASSES).train()
    grid, recipe = model.patch_grid, run.refiner.recipe
    with ExitStack() as stack:
        if backend == "triton":
            launch = pytest.importorskip("refiner_ds.attention.kernels.launch", exc_type=ImportError)
            stack.enter_context(launch.shapes_only())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(attention.attention_backend(backend))
        there(model, torch.bfloat16)
        made = InputMaker(run.refiner, CLASSES, grid, torch.bfloat16)(batch(maps), seed=3)
        out = model(made.images_B3HW, mix_box=made.box)
        if isinstance(out, torch.Tensor):
            losses = class_loss(out, made.target_BC, recipe.cls_weight)
        else:
            losses = token_label_loss(
                out[0], out[1], made.target_BC, made.target_BPC, recipe.cls_weight, recipe.dense_weight
            )
        losses = losses.plus("cos", model.cos_reg_loss())
        assert losses.total.device == CUDA and losses.total.shape == () and losses.total.dtype == torch.float32
        assert losses.total.requires_grad
