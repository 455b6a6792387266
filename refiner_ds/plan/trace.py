"""One micro-batch forward and backward on fake tensors: what autograd saves, the most that lives at once, the work.

Nothing is computed, so it takes a second or two for any size, and knows the model as it is rather than by formulas.

    saved        storages that autograd saves for backward, each once, by the kind of layer that made them
    peak         the most bytes alive at once, gradients of parameters apart, workspace of the operators included
    operations   every operation's FLOPs and bytes, for a roofline
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refiner_ds.attention import attention_backend, set_save_for_backward
from refiner_ds.attention.live_bytes import LiveBytes, Operation
from refiner_ds.attention.saving import assumed_memory
from refiner_ds.config import RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.losses import class_loss, token_label_loss

__all__ = ["Operation", "Trace", "trace"]

HEAD = "heads, loss and checkpoints"
KINDS = {
    "ConvStem": "stem",
    "MapAttention": "attention that makes maps",
    "SharedAttention": "attention that refines maps",
    "RefinedAttention": "attention that refines maps",
    "PlainAttention": "plain attention",
    "ScaledMlp": "MLP",
    "Block": "norms and residuals",
}


@dataclass(frozen=True)
class Trace:
    """A micro-batch in bytes.

    Attributes:
        saved: for backward, by kind of layer.
        inputs: images and targets.
        peak: alive at once, inputs and saved tensors included.
        operations: and how often each is done.
    """

    saved: dict[str, int]
    inputs: int
    peak: int
    operations: dict[Operation, int]


REMEMBERED = 32
TRACED: dict[str, Trace] = {}  # by what a micro-batch follows from, the newest last; kept.py brings it to disk
# Keys that change nothing about a micro-batch: runs that differ in them alone are counted once.
WITHOUT_EFFECT = {"init_from", "init_layers", "reset_head"}
WEIGHTS_OF_LOSSES = {"cls_weight", "dense_weight"}


def _fake_twin(model: nn.Module) -> None:
    """Put fake tensors in the place of a meta model's."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _loss(run: RunFile, model: RefinedViT, images_B3HW: Tensor, target_BC: Tensor, target_BPC: Tensor) -> Tensor:
    recipe = run.refiner.recipe
    out = model(images_B3HW)
    if isinstance(out, Tensor):
        losses = class_loss(out, target_BC, recipe.cls_weight)
    else:
        losses = token_label_loss(out[0], out[1], target_BC, target_BPC, recipe.cls_weight, recipe.dense_weight)
    return losses.plus("cos", model.cos_reg_loss()).total if run.refiner.model.cos_reg else losses.total


def trace(run: RunFile, classes: int, images: int, bf16: bool, backend: str, memory: int, gpu: bool = True) -> Trace:
    """Count a micro-batch, or look up what it came to before: plans of one model for several batches, ZeRO stages,
    numbers of processes or learning rates differ in what surrounds a micro-batch.

    Args:
        classes: of the data, used where ``refiner.model.num_classes`` is null.
        images: the micro-batch.
        bf16: whether the engine trains in bf16.
        backend: of refined attention.
        memory: bytes of the device, by which ``save_for_backward: auto`` decides.
        gpu: whether tiles are cut as for a GPU.
    """
    counted = {
        **run.keys.model_dump(mode="json", include={"activation_checkpointing"}),
        "model": run.refiner.model.model_dump(mode="json", exclude=WITHOUT_EFFECT),
        "recipe": run.refiner.recipe.model_dump(mode="json", include=WEIGHTS_OF_LOSSES),
    }
    key = json.dumps([counted, classes, images, bf16, backend, memory, gpu])
    if key not in TRACED:
        TRACED[key] = _trace(run, classes, images, bf16, backend, memory, gpu)
        if len(TRACED) > REMEMBERED:
            del TRACED[next(iter(TRACED))]
    return TRACED[key]


def _trace(run: RunFile, classes: int, images: int, bf16: bool, backend: str, memory: int, gpu: bool) -> Trace:
    keys = run.refiner.model
    with torch.device("meta"):
        model = build_model(run, classes).train()
    if bf16:
        model = model.to(torch.bfloat16)
    set_recompute(run, model)
    set_save_for_backward(keys.save_for_backward)
    saved: dict[str, int] = defaultdict(int)
    seen: list[Any] = []
    stack = [HEAD]
    for module in model.modules():
        if (kind := KINDS.get(type(module).__name__)) is not None:
            module.register_forward_pre_hook(lambda module, args, kind=kind: stack.append(kind))
            module.register_forward_hook(lambda module, args, out: stack.pop() and None)
    with ExitStack() as modes:
        modes.enter_context(attention_backend(backend))
        modes.enter_context(assumed_memory(memory))
        if find_spec("triton") is not None:
            from refiner_ds.attention.kernels.launch import shapes_only

            modes.enter_context(shapes_only())
        modes.enter_context(FakeTensorMode())
        _fake_twin(model)
        live = LiveBytes(gpu)
        own = set()
        for tensor in (*model.parameters(), *model.buffers()):
            live.know(tensor)
            own.add(tensor.untyped_storage()._cdata)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: _drop_gradient(live, p))

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                own.add(storage._cdata)
                seen.append(storage)  # held, or its address could be given to the next one
                saved[stack[-1]] += storage.nbytes()
            return tensor

        classes = keys.num_classes or classes
        dtype = torch.bfloat16 if bf16 else torch.float32
        modes.enter_context(live)
        pixels = torch.empty(images, keys.img_size, keys.img_size, 3, dtype=torch.uint8)
        batch = torch.empty(images, 3, keys.img_size, keys.img_size, dtype=dtype)
        target_BC = torch.empty(images, classes)
        target_BPC = torch.empty(images, model.patch_grid[0] * model.patch_grid[1], classes)
        inputs = live.now
        for tensor in (pixels, batch, target_BC, target_BPC):
            own.add(tensor.untyped_storage()._cdata)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = _loss(run, model, batch, target_BC, target_BPC)
        seen.clear()
        live.backward = True
        loss.backward()
    return Trace(dict(saved), inputs, live.peak, dict(Counter(live.operations)))


def _drop_gradient(live: LiveBytes, parameter: Tensor) -> None:
    """Gradients of parameters are counted with the model's states."""
    if parameter.grad is not None:
        live.forget(parameter.grad)
        parameter.grad = None
