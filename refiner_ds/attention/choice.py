"""Which backend is the fastest for a kind of attention: each is timed on the shapes it will meet, within counted bytes.

    Layer ──count──> bytes of each candidate, on fake tensors ──measure──> ms of those that fit ──choose──> a name

    first      triton, tiled, eager
    then       eager compiled, on a GPU; the configurations of triton ("triton[tall]"), if triton is the fastest so far

Nothing is run whose bytes were not counted first and found to fit. Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from refiner_ds.attention.backends import Backend
from refiner_ds.attention.dispatch import BACKENDS
from refiner_ds.attention.kernels import configurations
from refiner_ds.attention.live_bytes import LiveBytes
from refiner_ds.attention.timing import OutOfTime, clock_of, limited, seconds_of
from refiner_ds.attention.weights import Case, DeferredMap, RefinerWeights

__all__ = [
    "Candidate",
    "Layer",
    "Measured",
    "best_of",
    "by_rule",
    "candidates",
    "counted_as",
    "default_backend",
    "entries",
    "fits",
    "measure",
]

MARGIN = 1.02  # the device's default is kept unless another is faster by more: times repeat to a few percent
# A quarter of the free memory may go to what a faster backend saves and works with, as in saving.py.
SHARE = 1 / 4
# For compiling one candidate of the second kind. Inductor took 57 s for a bottleneck on a busy CPU, C++ included.
COMPILE_SECONDS = 60.0
FIRST = ("triton", "tiled", "eager")
PASSES = 5  # of each candidate where there is time: one to warm up and four of which the shortest counts


class Layer(NamedTuple):
    """One kind of attention in a model, as its layers will be called in training.

    Args:
        kind: "map", or what ``refiners.py`` calls the refiner.
        deferred: queries and keys of one image.
        value_BHNd: its values.
        weights: of the refiner; ``None`` where a map is made.
        scale: factor on refined maps.
        takes_map: whether the refiner is given a map rather than queries and keys.
        images: the micro-batch.
        at_once: how many such layers hold what they save for backward at the same time.
        save_for_backward: as ``attention.refine`` takes it.
    """

    kind: str
    deferred: DeferredMap
    value_BHNd: Tensor
    weights: RefinerWeights | None
    scale: float
    takes_map: bool
    images: int
    at_once: int
    save_for_backward: str

    @property
    def case(self) -> Case:
        """The call, of one image, about which backends are asked whether they support it."""
        source: Tensor | DeferredMap = self.deferred
        if self.takes_map:
            tokens = self.value_BHNd.shape[2]
            source = self.value_BHNd.new_zeros(*self.value_BHNd.shape[:2], tokens, tokens).requires_grad_()
        return Case(source, self.value_BHNd, self.weights)

    def describe(self) -> dict[str, Any]:
        """All that decides how long it takes, for a cache: shapes, dtypes, constants."""
        parts = tree_map(
            lambda x: [*x.shape, str(x.dtype), x.requires_grad] if isinstance(x, Tensor) else x, self.weights
        )
        shape = [self.images, *self.value_BHNd.shape[1:], str(self.value_BHNd.dtype)]
        return {
            "kind": self.kind, "shape": shape, "dropout": self.deferred.dropout, "weights": repr(parts),
            "takes_map": self.takes_map, "save_for_backward": self.save_for_backward,
        }  # fmt: skip


@dataclass
class Candidate:
    """One backend's figures for one kind of attention, or those of one configuration of triton, "triton[tall]".

    Attributes:
        saved: bytes saved for backward by a layer; None where it was not counted.
        working: the most bytes beyond these that live during forward and backward.
        milliseconds: forward and backward of ``Measured.images``; None where it was not timed.
        reason: why it was not.
        compiling: seconds of the first call, with all that is compiled in it; None where that is not noted.
    """

    backend: str
    saved: int | None = None
    working: int | None = None
    milliseconds: float | None = None
    reason: str = ""
    compiling: float | None = None


@dataclass
class Measured:
    """All candidates of one kind of attention; ``images`` were timed, fewer than the micro-batch where time or memory
    were short."""

    kind: str
    images: int
    candidates: list[Candidate]


def entries(layer: Layer) -> int:
    """Entries of the H maps of a micro-batch."""
    _, heads, tokens, _ = layer.value_BHNd.shape
    return layer.images * heads * tokens**2


def default_backend(layer: Layer, kernels: bool) -> str:
    """What computes a layer where nothing is chosen: the first of triton, tiled, eager that supports it."""
    return candidates(layer, kernels)[0]


def by_rule(layer: Layer, kernels: bool) -> str:
    """The backend of a layer that is too small to be timed: eager on CPUs, the default elsewhere.

    So few entries are cheap to keep, and tiled takes one to three times as long with them (see benchmarks).
    """
    return "eager" if layer.value_BHNd.device.type == "cpu" else default_backend(layer, kernels)


def candidates(layer: Layer, kernels: bool) -> list[str]:
    """The backends that support a layer, the default first, and configurations of triton.

    "eager compiled" is one of them on a GPU alone: on a CPU it takes longer to compile than most runs would gain by it.

    Args:
        kernels: whether triton is one of them, if it supports the layer.
    """
    device, names = layer.value_BHNd.device, list(FIRST if kernels else FIRST[1:])
    if device.type == "cuda" and BACKENDS["eager compiled"].runs_on(device) is None:
        names.append("eager compiled")
    able = [name for name in names if BACKENDS[name].supports(layer.case) is None]
    tiles = configurations.configurations_of(layer.kind) if "triton" in able else ()
    return [*able, *(configurations.joined("triton", name) for name in tiles)]


def best_of(measured: Measured) -> str:
    """The fastest candidate; the first, which is the device's default, where none is faster by more than 2 %."""
    timed = [one for one in measured.candidates if one.milliseconds is not None]
    if not timed:
        return measured.candidates[0].backend
    best = min(timed, key=lambda one: one.milliseconds or 0.0)
    first = measured.candidates[0]
    if first.milliseconds is not None and first.milliseconds <= MARGIN * (best.milliseconds or 0.0):
        return first.backend
    return best.backend


def fits(layer: Layer, one: Candidate, free: int) -> bool:
    """Whether what all such layers save, and what one works with, takes no more than a quarter of the free bytes."""
    assert one.saved is not None and one.working is not None
    return one.saved * layer.at_once + one.working <= SHARE * free


def measure(layer: Layer, free: int, seconds: float, kernels: bool) -> Measured:
    """Count the bytes of every candidate, and time those that fit.

    Args:
        free: bytes of memory that nobody uses yet, of which candidates other than the default may take a quarter.
        seconds: about how long the backends may take, and what comes after them again; what is compiled on the first
            call is not counted, but limited (:data:`COMPILE_SECONDS`).
        kernels: whether triton is a candidate.
    """
    found = [Candidate(name) for name in candidates(layer, kernels)]
    default, counted = found[0].backend, dict[str, tuple[int, int]]()
    for one in found:
        like = counted_as(one.backend)
        if like not in counted:  # the default is taken wherever nothing else fits: what it works with decides nothing
            counted[like] = count(layer, like, layer.images, inside=like != default)
        one.saved, one.working = counted[like]
        if like != default and not fits(layer, one, free):
            needed = (one.saved * layer.at_once + one.working) / 2**30
            one.reason = f"would take {needed:.1f} GiB, more than a quarter of what is free"
    able = [one for one in found if not one.reason]
    images = layer.images
    if len(able) > 1:
        largest = max((one.saved or 0) + (one.working or 0) for one in able)
        images = max(1, min(images, int(layer.images * SHARE * free / max(largest, 1))))
        images = _time(layer, [one for one in able if one.backend in FIRST], images, seconds)
        _time_others(layer, found, images, seconds)
    return Measured(layer.kind, images, found)


def counted_as(name: str) -> str:
    """The backend whose bytes a candidate's are taken for before it runs: tiles change none, and what is compiled saves
    what eager does or less, but for copies of statistics."""
    backend = configurations.parted(name)[0]
    return "eager" if backend == "eager compiled" else backend


def count(layer: Layer, backend: str, images: int, inside: bool = True) -> tuple[int, int]:
    """Bytes a layer saves for backward, and the most beyond these that live at once; nothing is allocated.

    Args:
        inside: look into this project's operators for what they work with: that takes as long as running them.
    """
    on_gpu = layer.value_BHNd.device.type == "cuda"
    saved: dict[int, int] = {}
    held: list[Any] = []
    with ExitStack() as modes:
        if find_spec("triton") is not None:
            from refiner_ds.attention.kernels.launch import shapes_only

            modes.enter_context(shapes_only())
        modes.enter_context(FakeTensorMode())

        def blank(x: Tensor, images: int | None) -> Tensor:
            shape = x.shape if images is None else (images, *x.shape[1:])
            return torch.empty(shape, dtype=x.dtype).requires_grad_(x.requires_grad)

        forward, leaves, own = _call(layer, BACKENDS[backend], images, blank)
        live = LiveBytes(on_gpu, look_inside=inside)
        known = {tensor.untyped_storage()._cdata for tensor in own}
        for tensor in own:
            live.know(tensor)

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in saved:
                held.append(storage)  # or its address could be given to the next one
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with live:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = forward()
            held.clear()
            torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)
    # Inputs that are saved belong to whoever made them: they are there whichever backend reads them.
    total = sum(saved.values())
    return total, max(0, live.peak - total)


def _call(
    layer: Layer, backend: Backend, images: int, make: Callable[[Tensor, int | None], Tensor]
) -> tuple[Callable[[], list[Tensor]], list[Tensor], list[Tensor]]:
    """A forward pass, the leaves of its gradients, and every tensor it is given.

    Args:
        make: a leaf like a tensor, of so many images; None: of no images.
    """
    q_BHNd, k_BHNd, v_BHNd = (make(x, images) for x in (layer.deferred.q_BHNd, layer.deferred.k_BHNd, layer.value_BHNd))
    deferred = layer.deferred._replace(q_BHNd=q_BHNd, k_BHNd=k_BHNd)
    weights = tree_map(lambda x: make(x, None) if isinstance(x, Tensor) else x, layer.weights)
    inputs = [q_BHNd, k_BHNd, v_BHNd]
    map_BHNN = None
    if weights is None or layer.takes_map:
        with torch.no_grad():
            map_BHNN = backend.make_map(deferred).to(v_BHNd.dtype)
        map_BHNN.requires_grad_()
        inputs = [*([] if layer.takes_map else inputs[:2]), v_BHNd, map_BHNN]
    own = [*inputs, *(x for x in tree_leaves(weights) if isinstance(x, Tensor))]

    def forward() -> list[Tensor]:
        if weights is None:
            return list(backend.attend(deferred, v_BHNd, map_BHNN))
        source = map_BHNN if layer.takes_map else deferred
        assert source is not None
        return [backend.refine(Case(source, v_BHNd, weights), layer.scale, layer.save_for_backward)]

    return forward, [x for x in own if x.requires_grad], own


def _step(layer: Layer, name: str, images: int) -> Callable[[], None]:
    """Forward and backward on so many images."""
    backend, configuration = configurations.parted(name)
    forward, leaves, _ = _call(layer, BACKENDS[backend], images, _repeated)

    def step() -> None:
        with configurations.using(layer.kind, configuration) if configuration else nullcontext():
            outputs = forward()
            torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)

    return step


def _repeated(x: Tensor, images: int | None) -> Tensor:
    """A leaf like a tensor for :func:`_call`. Statistics and buffers are copied too, so that no number of the model
    changes."""
    needed, x = x.requires_grad, x.detach()
    copied = x.clone() if images is None else x.expand(images, *x.shape[1:]).contiguous()
    return copied.requires_grad_(needed)


def _saved(layer: Layer, backend: str, images: int) -> int:
    """Bytes that a forward pass really saves for backward."""
    forward, _, own = _call(layer, BACKENDS[backend], images, _repeated)
    known, saved = {x.untyped_storage().data_ptr() for x in own}, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward()
    del outputs  # until here it held all that is saved, so that no two have one address
    return sum(saved.values())


Steps = list[tuple[Candidate, Callable[[], None]]]


def _time(layer: Layer, able: Sequence[Candidate], images: int, seconds: float) -> int:
    """Fill in milliseconds of each candidate; returns of how many images: fewer where these would take too long."""
    device, begin = layer.value_BHNd.device, time.monotonic()
    clock = clock_of(device)
    an_image = 0.0
    for one in able:
        try:
            step = _step(layer, one.backend, 1)
            step()  # compiles, and warms up
            an_image += seconds_of(step, device, clock)
        except Exception as error:  # compilers, drivers and allocators fail in more ways than can be listed
            one.reason = f"fails ({type(error).__name__})"
    images = max(1, min(images, int(seconds / max(2 * an_image, 1e-9))))
    steps: Steps = []
    for one in able:
        if one.reason:
            continue
        try:
            step = _step(layer, one.backend, images)
            step()
            steps.append((one, step))
        except RuntimeError as error:
            one.reason = f"fails on {images} images ({type(error).__name__})"
    _take_turns(steps, device, begin + seconds)
    return images


def _time_others(layer: Layer, found: Sequence[Candidate], images: int, seconds: float) -> None:
    """Fill in milliseconds of what is compiled for a while or only changes tiles, each beside the fastest backend."""
    timed = [one for one in found if one.milliseconds is not None]
    if not timed:
        return
    fastest = min(timed, key=lambda one: one.milliseconds or 0.0)
    steps: Steps = []
    for one in found:
        if one.backend in FIRST or one.reason:
            continue
        if configurations.parted(one.backend)[1] and fastest.backend != "triton":
            one.reason = "not timed, since triton is not the fastest"
            continue
        begin = time.monotonic()
        try:
            with limited(COMPILE_SECONDS), _lowered_at_once():
                step = _step(layer, one.backend, images)
                step()
                if one.backend == "eager compiled" and one.saved is not None and one.working is not None:
                    saved = _saved(layer, one.backend, images) * layer.images // images
                    one.saved, one.working = saved, max(0, one.working + one.saved - saved)
        except OutOfTime:
            one.reason = f"fails (not compiled within {COMPILE_SECONDS:.0f} s)"
        except Exception as error:
            one.reason = f"fails ({type(error).__name__})"
        else:
            one.compiling = time.monotonic() - begin
            steps.append((one, step))
    if steps:
        device = layer.value_BHNd.device
        steps.append((fastest, _step(layer, fastest.backend, images)))
        _take_turns(steps, device, time.monotonic() + seconds)


def _lowered_at_once() -> Any:
    """Inside, torch.compile makes a backward's code along with the forward's: in the thread that can be stopped."""
    return torch._functorch.config.patch(force_non_lazy_backward_lowering=True)


def _take_turns(steps: Steps, device: torch.device, until: float) -> None:
    """Time each candidate's step, the shortest of several passes; at least two, and no more after ``until``."""
    clock = clock_of(device)
    # Interleaved, so that a busy moment of the machine falls on all alike.
    for passed in range(1, PASSES):
        for one, step in steps:
            taken = 1000 * seconds_of(step, device, clock)
            one.milliseconds = taken if one.milliseconds is None else min(taken, one.milliseconds)
        if passed > 1 and time.monotonic() > until:
            break
