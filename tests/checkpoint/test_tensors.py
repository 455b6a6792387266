"""Files written as a stream are what the safetensors library writes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refiner_ds.checkpoint import tensors as module
from refiner_ds.checkpoint.tensors import Spec, TensorReader, TensorWriter, file_name, index_of
from refiner_ds.errors import CheckpointError
from refiner_ds.files import sha256_of

TENSORS = {
    "weight": torch.randn(3, 5), "scalar": torch.tensor(2.5), "count": torch.tensor(7), "none": torch.zeros(0, 4),
    "half": torch.randn(3).bfloat16(), "flags": torch.tensor([True, False]), "bytes": torch.ones(5, dtype=torch.uint8),
}  # fmt: skip


def write(file: Path, tensors: dict[str, torch.Tensor]) -> module.Written:
    with TensorWriter(file, {name: Spec(one.shape, one.dtype) for name, one in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def test_the_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)  # so that tensors are cut anywhere
    file = tmp_path / "model.safetensors"
    written = write(file, TENSORS)
    assert written == (file.stat().st_size, sha256_of(file))
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers asks for it


def test_tensors_come_in_the_order_and_form_that_was_announced(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.Size([2])), "b": Spec(torch.Size([2]))}
    for first, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2).double())):
        with pytest.raises(ValueError), TensorWriter(tmp_path / "x", specs) as writer:
            writer.add(first, tensor)
    with pytest.raises(ValueError, match="b was not written"), TensorWriter(tmp_path / "x", specs) as writer:
        writer.add("a", torch.zeros(2))
        writer.finish()


def test_one_file_or_several_read_alike(tmp_path: Path) -> None:
    names = list(TENSORS)
    for part in range(2):
        write(tmp_path / file_name("ema", part, 2), {name: TENSORS[name] for name in names[part::2]})
    (tmp_path / "ema.safetensors.index.json").write_text(
        module.json.dumps(index_of("ema", [names[0::2], names[1::2]], 99))
    )
    reader = TensorReader(tmp_path, "ema")
    assert set(reader.names()) == set(names) and "weight" in reader and "other" not in reader
    assert reader.shape("weight") == (3, 5) and torch.equal(reader["weight"], TENSORS["weight"])
    with pytest.raises(CheckpointError, match="other cannot be read"):
        reader["other"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"[]"])
def test_a_damaged_file_is_one_sentence(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read .*; give another checkpoint"):
        TensorReader(tmp_path, "model").names()
    (tmp_path / "model.safetensors.index.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        TensorReader(tmp_path, "model")
