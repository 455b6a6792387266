"""One function for each thing a block does with attention maps, and the choice of the backend that computes it.

    attend            q, k, v (+ residual map) ──> A·V and A      a block that makes a map
    refine            A, or q and k, and v ──> refined A·V        a block that refines one
    plain_attention   q, k, v ──> A·V                             a block of a plain ViT

REFINER_ATTENTION, or ``backend``, requests a backend; else one may have been chosen for the kind of operation
(choice.py); else it is "triton" on a GPU and "tiled" elsewhere. What triton does not support is computed by tiled, and
what tiled does not support by eager; a log line says what and why.
On CPU tiled saves a quarter to a fiftieth of eager's bytes for backward; docs/benchmarks.md has its times.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refiner_ds.attention.backends import Backend
from refiner_ds.attention.backends.eager import EagerBackend
from refiner_ds.attention.backends.eager_compiled import EagerCompiledBackend
from refiner_ds.attention.backends.tiled import TiledBackend
from refiner_ds.attention.backends.triton import TritonBackend
from refiner_ds.attention.checks import check_case
from refiner_ds.attention.first_order import is_transformed
from refiner_ds.attention.kernels import configurations
from refiner_ds.attention.masking import outside_mask, zero_padding
from refiner_ds.attention.refiners import load_implementations, refiner_of
from refiner_ds.attention.saving import check_save_for_backward
from refiner_ds.attention.weights import Case, DeferredMap, RefinerWeights

__all__ = [
    "BACKENDS",
    "attend",
    "attention_backend",
    "choose_backend",
    "compiles_eager",
    "describe_backend",
    "is_traced",
    "kernels_verified",
    "kind_of",
    "plain_attention",
    "refine",
    "resolve_backend",
    "set_save_for_backward",
    "use_backends",
]

log = logging.getLogger(__name__)

EAGER, TILED, TRITON, EAGER_COMPILED = EagerBackend(), TiledBackend(), TritonBackend(), EagerCompiledBackend()
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (EAGER, TILED, TRITON, EAGER_COMPILED)}

# Requested backend -> whom to ask, in turn; eager supports every case.
CANDIDATES: dict[str, tuple[Backend, ...]] = {
    "eager": (EAGER,),
    "tiled": (TILED, EAGER),
    "triton": (TRITON, TILED, EAGER),
    "eager compiled": (EAGER_COMPILED, EAGER),
}

_save_for_backward = "auto"
# Kind of operation ("map", or a refiner's name) -> the backend chosen for it in training.
_chosen: dict[str, str] = {}
# What is set and chosen by attention_backend and use_backends, in one string.
_request = ""
# Requested backend -> kind of operation -> what stands in for it, and why.
_fallbacks: dict[str, dict[str, str]] = {}


def is_traced() -> bool:
    """Whether a compiler, a tracer or an exporter is recording what is computed."""
    return torch.compiler.is_compiling() or _is_decomposed()


def _is_decomposed() -> bool:
    """Whether what records knows PyTorch's own operators only: it is given the eager backend.

    Raises:
        RuntimeError: it is the legacy ONNX exporter, which traces.
    """
    exporting = torch.onnx.is_in_onnx_export()
    if torch.compiler.is_compiling():
        return exporting
    if torch.jit.is_tracing() and exporting:
        raise RuntimeError("the legacy ONNX exporter is not supported; call torch.onnx.export(..., dynamo=True)")
    return torch.jit.is_tracing() or exporting


@cache
def kernels_verified(device: torch.device) -> bool:
    """Whether triton is the default: on a GPU where its kernels agree with tiled."""
    if device.type != "cuda" or TRITON.runs_on(device) is not None:
        return False
    from refiner_ds.attention.backends.selfcheck import mismatch

    if (found := mismatch(TRITON, device)) is not None:
        warnings.warn(f"attention: tiled on {device}, because the Triton kernels {found}", stacklevel=2)
    return found is None


def resolve_backend(backend: str | None = None, device: torch.device | None = None, kind: str | None = None) -> str:
    """The name of the backend that is requested: ``backend``, else REFINER_ATTENTION, else the one chosen, else the
    device's default.

    Args:
        backend: a key of :data:`BACKENDS`, or ``None``.
        device: where the tensors are; ``None`` is the CPU.
        kind: of operation, "map" or a refiner's name; ``None`` asks for no choice.
    Raises:
        ValueError: there is no such backend, or the device cannot run it.
    """
    device = device or torch.device("cpu")
    name = backend or os.environ.get("REFINER_ATTENTION", "") or _chosen_for(kind)
    name = name or ("triton" if kernels_verified(device) else "tiled")
    if name not in BACKENDS:
        raise ValueError(f"REFINER_ATTENTION is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if (reason := BACKENDS[name].runs_on(device)) is not None:
        able = " or ".join(one.name for one in CANDIDATES[name] if one.runs_on(device) is None)
        raise ValueError(f"REFINER_ATTENTION is {name!r}, but {reason}; take {able}")
    return name


def _chosen_for(kind: str | None) -> str:
    """What is chosen for a kind of operation; nothing in inference mode, since training was timed."""
    return "" if kind is None or torch.is_inference_mode_enabled() else _chosen.get(kind, "")


def use_backends(chosen: dict[str, str]) -> None:
    """From now on, in this process, kinds of operation are computed in training by these backends, unless another is
    asked for.

    Args:
        chosen: "map" or a refiner's name -> a key of :data:`BACKENDS`, or a configuration of triton, "triton[tall]",
            which evaluation by the same kernels then uses too; the default computes what is missing.
    Raises:
        ValueError: a kind has no such configuration.
    """
    parts = {kind: configurations.parted(name) for kind, name in chosen.items()}
    configurations.use({kind: name for kind, (_, name) in parts.items() if name})
    _chosen.clear()
    _chosen.update({kind: backend for kind, (backend, _) in parts.items()})
    _note_request()


def compiles_eager() -> bool:
    """Whether some attention is computed by "eager compiled", so that first calls take long."""
    return EAGER_COMPILED.name in (os.environ.get("REFINER_ATTENTION"), *_chosen.values())


def kind_of(case: Case) -> str:
    """ "map", or the refiner's name."""
    return "map" if case.weights is None else refiner_of(case.weights).name


@contextmanager
def attention_backend(backend: str) -> Iterator[None]:
    """Inside, REFINER_ATTENTION is ``backend``."""
    before = os.environ.get("REFINER_ATTENTION")
    os.environ["REFINER_ATTENTION"] = backend
    _note_request()
    try:
        yield
    finally:
        os.environ.pop("REFINER_ATTENTION")
        if before is not None:
            os.environ["REFINER_ATTENTION"] = before
        _note_request()


def _note_request() -> None:
    """Have what is compiled from here on hold for the request as it is now, and what was compiled for another not."""
    global _request
    _request = " ".join([os.environ.get("REFINER_ATTENTION", ""), *(f"{kind}={_chosen[kind]}" for kind in _chosen)])


def _backend_for(case: Case, backend: str | None, residual_BHNN: Tensor | None = None) -> Backend:
    """The first of the requested backend and its stand-ins that supports the case, after a check of the arguments."""
    if _is_decomposed():
        return EAGER
    if torch.compiler.is_compiling():
        name = _compiled_backend(backend, case.value_BHNd.device.type, kind_of(case), _request)
        return next(one for one in CANDIDATES[name] if one.supports(case) is None)
    _check(case, residual_BHNN)
    kind = kind_of(case)
    requested = resolve_backend(backend, case.value_BHNd.device, kind)
    candidate, reasons = _first_able(requested, case)
    _report(requested, kind, f"{kind}: {candidate.name}, because {reasons[0]}" if reasons else "")
    return candidate


def _first_able(requested: str, case: Case) -> tuple[Backend, list[str]]:
    """The first of the requested backend and its stand-ins that supports a case, and why those before it do not."""
    reasons: list[str] = []
    for candidate in CANDIDATES[requested]:
        if (reason := candidate.supports(case)) is None:
            break
        reasons.append(reason)
    return candidate, reasons


def choose_backend(case: Case, device: torch.device) -> tuple[str, str | None]:
    """The name of the backend that would compute a case on a device, with its configuration, and the reason where it is
    not the requested one.

    Raises:
        TypeError: the case's weights are of no known kind.
        ValueError: there is no such backend, or the device cannot run it.
    """
    kind = kind_of(case)
    candidate, reasons = _first_able(resolve_backend(device=device, kind=kind), case)
    configuration = configurations.in_use(kind) if candidate is TRITON else ""
    return configurations.joined(candidate.name, configuration), reasons[0] if reasons else None


@torch.compiler.assume_constant_result
def _compiled_backend(backend: str | None, device: str, kind: str, request: str) -> str:
    """:func:`resolve_backend` as the compiler calls it, while it traces.

    Args:
        request: read by the caller, so that the compiler guards what it makes by it; models of one shape share code.
    """
    name = resolve_backend(backend, torch.device(device), kind)
    for candidate in CANDIDATES[name]:
        if candidate in (TILED, TRITON):
            load_implementations(candidate.name)
    return name


def _check(case: Case, residual_BHNN: Tensor | None) -> None:
    """Refuse arguments that do not fit together."""
    check_case(case, residual_BHNN)
    if case.weights is not None and case.mask_BN is not None and not refiner_of(case.weights).takes_mask:
        raise ValueError(f"{refiner_of(case.weights).name} takes no mask; pad nothing, or let its row say takes_mask")
    if case.weights is not None and (check := refiner_of(case.weights).check) is not None:
        check(case.weights, case)


def _report(requested: str, kind: str, fallback: str) -> None:
    """Log the requested backend and every kind of operation that another one computes, whenever either changes."""
    known = _fallbacks.setdefault(requested, {})
    if known.get(kind) == fallback:
        return
    known[kind] = fallback
    log.info("attention: %s", _described(requested))


def _described(requested: str) -> str:
    fallbacks = "; ".join(one for one in _fallbacks.get(requested, {}).values() if one)
    return f"{requested} ({fallbacks})" if fallbacks else requested


def describe_backend(device: torch.device) -> str:
    """The backend requested on a device and what has stood in for it so far: "triton (map: tiled, because …)"."""
    return _described(resolve_backend(device=device))


def set_save_for_backward(save_for_backward: str) -> None:
    """What bottlenecks save for backward from now on, in this process.

    Args:
        save_for_backward: "map" (the map alone, and recompute), "activations" (the inputs of two norms too, five times
            the bytes and less work), or "auto", which decides by the device's memory.
    Raises:
        ValueError: any other word.
    """
    global _save_for_backward
    _save_for_backward = check_save_for_backward(save_for_backward)


def attend(
    deferred: DeferredMap, value_BHNd: Tensor, residual_BHNN: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Make the map of a block, add the residual map of the block before, and multiply the values with the sum.

    Args:
        deferred: queries and keys, their scale and dropout.
        value_BHNd: values.
        residual_BHNN: the map of the block before, added scale times, zero for padding whatever was there; ``None`` in
            the first block.
        backend: which backend to ask first; ``None`` leaves it to REFINER_ATTENTION and to the device.
    Returns:
        [B, H, N, d], and the map [B, H, N, N] for the next block, both in the values' dtype.
    Raises:
        ValueError: arguments do not fit together, there is no such backend, or the device cannot run it.
    """
    chosen = _backend_for(Case(deferred, value_BHNd), backend, residual_BHNN)
    if residual_BHNN is not None and deferred.mask_BN is not None:
        residual_BHNN = residual_BHNN.masked_fill(outside_mask(deferred.mask_BN), 0.0)
    return chosen.attend(deferred, value_BHNd, residual_BHNN)


def refine(
    attn: Tensor | DeferredMap,
    value_BHNd: Tensor,
    weights: RefinerWeights,
    scale: float = 1.0,
    backend: str | None = None,
    save_for_backward: str | None = None,
    mask_BN: Tensor | None = None,
) -> Tensor:
    """Refine attention maps and multiply the values with them.

    Of padded sequences each comes out as it would alone: padding is zero before the convolution and after it, takes
    no part in the statistics of norms, and has no gradient. Only statistics of a batch join its sequences.

    Args:
        attn: the maps, [B, H, N, N], or the queries and keys they are made of.
        value_BHNd: values.
        weights: of the refiner; norms in training mode have their running statistics updated here, once.
        scale: factor on the refined maps (:class:`FoldedWeights` contain it already).
        backend: which backend to ask first; ``None`` leaves it to REFINER_ATTENTION and to the device.
        save_for_backward: see :func:`set_save_for_backward`; ``None`` is what was set there.
        mask_BN: which tokens are real, [B, N] bool, for maps; queries and keys bring theirs. ``None`` where all are.
    Returns:
        [B, H, N, d] in the values' dtype; [B, E, N, d] where the refiner does not reduce; zero for padding.
    Raises:
        TypeError: the weights are of no known kind.
        ValueError: arguments do not fit together, there is no such backend, the device cannot run it, or nothing that
            can be saved has that name.
    """
    # The view sums the refiner's own gradients of the map before those of its other users, so that rounding happens in
    # the same order whether or not the refiner is recomputed by itself.
    attn = attn if isinstance(attn, DeferredMap) else attn.view_as(attn).to(value_BHNd.dtype)
    mask_BN = attn.mask_BN if isinstance(attn, DeferredMap) else mask_BN
    case = Case(attn, value_BHNd, weights, mask_BN)
    saved = _save_for_backward if save_for_backward is None else check_save_for_backward(save_for_backward)
    chosen = _backend_for(case, backend)
    if mask_BN is None:
        return chosen.refine(case, scale, saved)
    if isinstance(attn, Tensor):
        case = case._replace(attn=attn.masked_fill(outside_mask(mask_BN), 0.0))
    case = case._replace(value_BHNd=zero_padding(value_BHNd, mask_BN))
    return zero_padding(chosen.refine(case, scale, saved), mask_BN)


def plain_attention(deferred: DeferredMap, value_BHNd: Tensor) -> Tensor:
    """Softmax attention without a refiner, by PyTorch's fused kernels, [B, H, N, d].

    They have no derivatives in forward mode; transforms get PyTorch's plain operators. Nor have they second ones:
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` gives those, whatever backend of refined attention is asked for.
    """
    mask_BN = deferred.mask_BN
    transformed = not torch.compiler.is_compiling() and is_transformed()
    with sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext():
        return F.scaled_dot_product_attention(
            deferred.q_BHNd, deferred.k_BHNd, value_BHNd, None if mask_BN is None else mask_BN[:, None, None, :],
            dropout_p=deferred.dropout, scale=deferred.scale,
        )  # fmt: skip
