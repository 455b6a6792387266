"""Named tensors in safetensors files: written as a stream that is hashed on its way, read name by name.

One file, or, where several ranks wrote a part each, the layout that Hugging Face reads:

    model.safetensors         model-00001-of-00002.safetensors  model-00002-of-00002.safetensors
                              model.safetensors.index.json      {"weight_map": {name: file}, …}

The format: 8 bytes, the header's length; the header, JSON, each name's dtype, shape and place; the tensors' bytes. The
library's own ``save_file`` wants everything in memory twice and holds Python's lock while it writes, which would stop
the training beside it; reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refiner_ds.errors import CheckpointError

DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 1 << 24  # bytes hashed and written at once


class Spec(NamedTuple):
    """A tensor that will be written: its shape and dtype."""

    shape: torch.Size
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        """Bytes it takes on disk."""
        return self.shape.numel() * self.dtype.itemsize


class Written(NamedTuple):
    """A file that was written: bytes and SHA-256."""

    size: int
    sha256: str


class TensorWriter:
    """Writes one safetensors file, tensor by tensor in the order of ``specs``; to be used in a ``with`` block.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, specs: Mapping[str, Spec]) -> None:
        self._specs = list(specs.items())
        self._next = 0
        self._digest = hashlib.sha256()
        self._size = 0
        self._file = open(file, "wb", buffering=0)
        header, offset = {}, 0
        for name, spec in self._specs:
            place = [offset, offset + spec.bytes]
            header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
            offset += spec.bytes
        encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._put(memoryview(len(encoded).to_bytes(8, "little") + encoded))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be contiguous and on the CPU."""
        expected, spec = self._specs[self._next]
        if (name, tensor.shape, tensor.dtype) != (expected, *spec):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} where {expected} {spec} comes next")
        self._next += 1
        self._put(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B"))  # type: ignore[arg-type]

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
        self._size += len(data)

    def finish(self) -> Written:
        """Bring the file to the disk."""
        if self._next != len(self._specs):
            raise ValueError(f"{self._specs[self._next][0]} was not written")
        os.fsync(self._file.fileno())
        return Written(self._size, self._digest.hexdigest())

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def file_name(stem: str, part: int, parts: int) -> str:
    """The name of the ``part``-th of so many files, counted from 0."""
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def index_of(stem: str, names: Iterable[Iterable[str]], total_bytes: int) -> dict[str, Any]:
    """What ``<stem>.safetensors.index.json`` holds.

    Args:
        names: of the tensors in each file.
    """
    parts = [list(part) for part in names]
    places = {name: file_name(stem, number, len(parts)) for number, part in enumerate(parts) for name in part}
    return {"metadata": {"total_size": total_bytes}, "weight_map": places}


class TensorReader:
    """Reads tensors by name from one file or several; memory-mapped, so that only what is taken is read.

    Args:
        folder: of a checkpoint.
        stem: "model", "ema" or "optimizer".
    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        single = folder / f"{stem}.safetensors"
        index = folder / f"{stem}.safetensors.index.json"
        self._open: dict[str, Any] = {}
        try:
            if index.is_file():
                self._place = dict(json.loads(index.read_text())["weight_map"])
            else:
                self._place = dict.fromkeys(self._file(single.name).keys(), single.name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{single}: cannot be read ({error}); give another checkpoint") from None

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> list[str]:
        """Of every tensor."""
        return list(self._place)

    def shape(self, name: str) -> torch.Size:
        """Of one tensor, without reading it."""
        return torch.Size(self._file(self._place[name]).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._file(self._place[name]).get_tensor(name)
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read ({error}); give another checkpoint") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]
