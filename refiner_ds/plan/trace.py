"""One micro-batch forward and backward on fake tensors: what autograd saves, the most that lives at once, the work.

Nothing is computed, so it takes a second or two for any size, and knows the model as it is rather than by formulas.

    saved        storages that autograd saves for backward, each once, by the kind of layer that made them
    peak         the most bytes alive at once, gradients of parameters apart, workspace of the operators included
    operations   every operation's FLOPs and bytes, for a roofline
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from refiner_ds.attention import attention_backend, set_save_for_backward
from refiner_ds.attention.operators import IMPLEMENTATIONS
from refiner_ds.attention.saving import assumed_memory
from refiner_ds.attention.tiling import tiles as tiling
from refiner_ds.attention.tiling.tiles import GPU_TILE_BYTES
from refiner_ds.config import RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.losses import class_loss, token_label_loss

__all__ = ["Operation", "Trace", "trace"]

HEAD = "heads, loss and checkpoints"
# Arguments of the operators that have an entry for every image.
PER_IMAGE = {"map", "q", "k", "value", "residual", "grad", "map_grad", "lse", "source", "activations"}
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
class Operation:
    """One operation: whether backward runs it, its floating-point operations, and the bytes of its tensors."""

    backward: bool
    flops: int
    bytes: int


@dataclass(frozen=True)
class Trace:
    """A micro-batch in bytes.

    Attributes:
        saved: for backward, by kind of layer.
        inputs: images and targets.
        peak: alive at once, inputs and saved tensors included.
        operations: in order.
    """

    saved: dict[str, int]
    inputs: int
    peak: int
    operations: list[Operation]


class _Live(TorchDispatchMode):
    """Counts the bytes of storages from their first use to their end."""

    def __init__(self, gpu: bool, look_inside: bool = True) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.backward = False
        self.operations: list[Operation] = []
        self._gpu, self._look_inside = gpu, look_inside
        self._known: weakref.WeakKeyDictionary[Any, weakref.finalize[..., Any] | None] = weakref.WeakKeyDictionary()
        self._workspaces: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.add(tensor)
        if not self._look_inside:
            return out
        if func.namespace == "refiner_ds":
            self.peak = max(self.peak, self.now + self._workspace(func, args, kwargs))
        if not func.is_view and "empty" not in func.__name__ and not func.__name__.startswith("detach"):
            count = flop_registry.get(func._overloadpacket)
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + made
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            flops = 0 if count is None else count(*args, **kwargs, out_val=out)
            self.operations.append(Operation(self.backward, flops, moved))
        return out

    def know(self, tensor: Tensor) -> None:
        """Take a tensor for one that was there before."""
        self._known[tensor.untyped_storage()] = None

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = weakref.finalize(storage, self._end, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no longer, though it lives."""
        end = self._known.get(tensor.untyped_storage())
        if end is not None:
            end()

    def _end(self, size: int) -> None:
        self.now -= size

    def _workspace(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Bytes that an operator of this project allocates on its way, beyond what it returns.

        Its own code runs on fake tensors of one and of two images, and what two add is added for every further one.
        """
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        leaves = tree_leaves(given)
        key = f"{func} {[(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves]}"
        if key not in self._workspaces:
            batch = next(len(x) for x in tree_leaves([given.get(n) for n in ("map", "q", "value")]) if x is not None)
            function = IMPLEMENTATIONS[func._schema.name]
            one, two = (self._inside(function, given, few) for few in (1, 2))
            self._workspaces[key] = one + (two - one) * (batch - 1)
        return self._workspaces[key]

    def _inside(self, function: Callable[..., Any], given: dict[str, Any], few: int) -> int:
        def cut(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() < 3:
                return x
            if "triton" in given.values() and x.dim() == 4 and x.shape[-1] == x.shape[-2]:
                from refiner_ds.attention.kernels.padded import empty_padded

                return empty_padded(x[:few])
            return torch.empty_strided((few, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)

        inner = _Live(self._gpu, look_inside=False)
        fewer = {name: tree_map(cut, value) if name in PER_IMAGE else value for name, value in given.items()}
        for tensor in tree_leaves(fewer):
            if isinstance(tensor, Tensor):
                inner.know(tensor)
        with inner, torch.no_grad(), _tiles_of(GPU_TILE_BYTES if self._gpu else tiling.CPU_TILE_BYTES):
            out = [x for x in tree_leaves(function(**_by_position(function, fewer))) if isinstance(x, Tensor)]
        return max(
            0, inner.peak - sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in out}.values())
        )


@contextmanager
def _tiles_of(size: int) -> Iterator[None]:
    """Inside, tiles of CPU tensors, as fake ones are, are cut to so many bytes."""
    before, tiling.CPU_TILE_BYTES = tiling.CPU_TILE_BYTES, size
    try:
        yield
    finally:
        tiling.CPU_TILE_BYTES = before


def _by_position(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the function's own names, which carry axes where the operator's schema does not."""
    return dict(zip(inspect.signature(function).parameters, given.values(), strict=True))


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
    """Count a micro-batch.

    Args:
        classes: of the data, used where ``refiner.model.num_classes`` is null.
        images: the micro-batch.
        bf16: whether the engine trains in bf16.
        backend: of refined attention.
        memory: bytes of the device, by which ``save_for_backward: auto`` decides.
        gpu: whether tiles are cut as for a GPU.
    """
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
        live = _Live(gpu)
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
    return Trace(dict(saved), inputs, live.peak, live.operations)


def _drop_gradient(live: _Live, parameter: Tensor) -> None:
    """Gradients of parameters are counted with the model's states."""
    if parameter.grad is not None:
        live.forget(parameter.grad)
        parameter.grad = None
