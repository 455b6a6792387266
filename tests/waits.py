"""What would make the host wait for a GPU, found on a CPU: operations that need a number there, and copies to or from.

with Waits() as waits:
    ...                      waits.found: (operation, file:function) → how often

Host tensors and the device's are the same here, so numbers that the host draws for itself are found as well.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from refiner_ds.attention.operators import IMPLEMENTATIONS

READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave", "_linalg_check_errors", "allclose",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# On a GPU these copy numbers from pageable memory, or to it, and wait for all that is queued.
COPIES = {"tensor", "as_tensor", "new_tensor", "cpu", "numpy", "tolist", "from_numpy", "asarray"}


class Waits:
    """Counts, while it is entered, what would wait; it looks into this project's operators."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Waits:
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def note(self, what: str) -> None:
        """Count one, at the innermost function of this project or of DeepSpeed that is running."""
        frame, place = sys._getframe(1), ""
        while frame is not None and not place:
            path = Path(frame.f_code.co_filename)
            for package in ("refiner_ds", "deepspeed"):
                if package in path.parts:
                    inside = path.parts[len(path.parts) - path.parts[::-1].index(package) - 1 :]
                    place = f"{'/'.join(inside)}:{_function(frame)}"
            frame = frame.f_back  # type: ignore[assignment]
        self.found[what, place or "elsewhere"] += 1


def _function(frame: Any) -> str:
    """The function's name; of a comprehension, that of the function it stands in."""
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name


class _Functions(TorchFunctionMode):
    """Python's own calls: copies that no operation shows where everything is on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES:
            self._waits.note(name)
        if name == "__getitem__" and any(isinstance(part, list) for part in _parts(args[1])):
            self._waits.note("index by a list")
        return func(*args, **(kwargs or {}))


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in READS:
            self._waits.note(name)
        if name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self._waits.note("index by a mask")
        if func.namespace == "refiner_ds":
            with self._waits_inside(), torch.no_grad():
                return IMPLEMENTATIONS[func._schema.name](*args, **kwargs)
        return func(*args, **kwargs)

    def _waits_inside(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(_Functions(self._waits))
        stack.enter_context(_Operations(self._waits))
        return stack
