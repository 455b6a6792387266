"""Where Triton kernels can run, the one offset that launches them, and compiling them for a GPU that is not there.

launch(kernel, grid, *args, **options)    runs it: on a GPU, or in Triton's interpreter on CPU tensors
with compile_only(90) as compiled:        inside, launches compile for that architecture and run nothing
    ...                                   compiled: registers, spilled bytes and shared memory of each
with recording() as launched:             inside, the bytes, and on a GPU the time, of every launch are noted
with shapes_only():                       inside, kernels run on any device, and do nothing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from refiner_ds.attention.kernels.machine_code import Executed, amd_resources, executed, resources
from refiner_ds.attention.weights import LocalKernels

__all__ = [
    "INTERPRETED",
    "Compiled",
    "Launch",
    "architecture",
    "compile_only",
    "launch",
    "recording",
    "runs_on",
    "shapes_only",
    "shared_memory",
    "unsupported_kernel_size",
]

# Triton decides when a kernel is defined: TRITON_INTERPRET=1 must have been set by then.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_compiled: dict[str, Compiled] | None = None
_launched: list[Launch] | None = None
_shapes_only = False


class Compiled(NamedTuple):
    """What the compiler says of one kernel as launched.

    Args:
        name: the kernel's name and its constants.
        registers: of a thread.
        spilled: bytes of a thread's plane; 0 where everything fits into registers.
        shared: bytes of shared memory a program takes.
        warps: of a program.
        executed: by a warp; ``None`` where it cannot be told.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    executed: Executed | None


class Launch(NamedTuple):
    """One launch.

    Args:
        name: the kernel's.
        bytes: of all tensors it was given, each read or written at least once: no kernel moves less.
        milliseconds: elapsed on the GPU; 0 elsewhere.
        programs: points of the grid.
        compiled: what was launched; ``None`` in the interpreter.
    """

    name: str
    bytes: int
    milliseconds: float
    programs: int
    compiled: Compiled | None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of this device."""
    return device.type == "cuda" or INTERPRETED or _compiled is not None or _shapes_only


def architecture(device: torch.device) -> int | str | None:
    """What kernels for a device are compiled for, or are compiled for here: 90 for Hopper, "gfx942" for an MI300.

    ``None`` where nothing is compiled.
    """
    if _compiled is not None:
        found: int | str = driver._active.get_current_target().arch
        return found
    if device.type != "cuda" or INTERPRETED or _shapes_only:
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return int(10 * properties.major + properties.minor)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take on a device, or on the one that is compiled for."""
    if _compiled is not None:
        return (99 << 10) if driver._active.get_current_target().arch in (86, 89, 120) else 160 << 10
    if device.type != "cuda" or _shapes_only:
        return 160 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 160 << 10))


def unsupported_kernel_size(local: LocalKernels) -> str | None:
    """The reason why no kernel convolves with these, or ``None``."""
    size = local.kernels[0].shape[-1]
    return None if size in (1, 3) else f"kernels take kernel_size 1 or 3, not {size}"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel`` once for every point of ``grid``; ``options`` are its constants and ``num_warps`` and the like."""
    if _shapes_only:
        return
    if _launched is not None:
        _launched.append(_noted(kernel, grid, args, options))
    else:
        _run(kernel, grid, args, options)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What Triton compiled, launched unless that is all that is wanted."""
    # Explicit, since Triton announces another default, and the measured registers are of this one.
    options = {"enable_fp_fusion": True, **options}
    if _compiled is None:
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel[grid](*args, **options)
    made = kernel.warmup(*args, grid=grid, **options)
    found = _examined(made, kernel, args, options)
    _compiled.setdefault(found.name, found)
    return made


def _examined(made: Any, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    """The figures of a compiled kernel, launched with these arguments."""
    constants = {name: value for name, value in options.items() if name not in ("num_warps", "enable_fp_fusion")}
    numbers = {n: x for n, x in zip(kernel.arg_names, args, strict=False) if isinstance(x, int)}
    name = " ".join([made.metadata.name, *(f"{key}={value}" for key, value in {**constants, **numbers}.items())])
    if _compiled is not None and name in _compiled:
        return _compiled[name]
    shared, warps = made.metadata.shared, made.metadata.num_warps
    if "amdgcn" in made.asm:
        return Compiled(name, *amd_resources(made.asm["amdgcn"]), shared, warps, None)
    ran = executed(made.asm["cubin"], made.asm["ttgir"], {**constants, **numbers})
    return Compiled(name, *resources(made.asm["cubin"]), shared, warps, ran)


def _noted(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    tensors = {x.data_ptr(): x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor)}
    moved, programs = sum(tensors.values()), math.prod(grid)
    made = _run(kernel, grid, args, options)  # compiles, and warms up
    compiled = _examined(made, kernel, args, options) if hasattr(made, "asm") else None
    if _compiled is not None or not torch.cuda.is_available():
        return Launch(kernel.__name__, moved, 0.0, programs, compiled)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    _run(kernel, grid, args, options)
    last.record()
    torch.cuda.synchronize()
    return Launch(kernel.__name__, moved, first.elapsed_time(last), programs, compiled)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, kernels are taken to run on any device and launches do nothing: for tensors that hold no numbers."""
    global _shapes_only
    _shapes_only = True
    try:
        yield
    finally:
        _shapes_only = False


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, every launch is noted in the list that this gives; each kernel runs twice on a GPU, so only look."""
    global _launched
    _launched = []
    try:
        yield _launched
    finally:
        _launched = None


class _AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: int | str) -> None:
        nvidia = isinstance(architecture, int)
        self.target = GPUTarget("cuda" if nvidia else "hip", architecture, 32 if nvidia else 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        # Triton caches compiled kernels by device: another architecture must be another device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(architecture: int | str) -> Iterator[dict[str, Compiled]]:
    """Inside, :func:`launch` compiles for an architecture (90 is Hopper, "gfx942" an MI300) and runs nothing; no GPU is
    needed.

    Results of kernels are left as they were allocated.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    global _compiled
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
    before, _compiled = driver._active, {}
    driver.set_active(_AbsentGPU(architecture))
    try:
        yield _compiled
    finally:
        _compiled = None
        driver._active = before
