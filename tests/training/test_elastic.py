"""A checkpoint of any number of processes, ZeRO stage and precision is resumed by any other, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refiner_ds.checkpoint.files import integrity_errors
from refiner_ds.checkpoint.tensors import TensorReader
from refiner_ds.run_folder import RunFolder
from tests.training.launched import ranks

SCRIPT = Path(__file__).with_name("elastic_script.py")
STEMS = ("model", "ema", "optimizer")
NEAR = {"fp32": 1e-4, "bf16": 0.1}  # of forward's logits from a plain fp32 model's


def launch(folder: Path, processes: int, *arguments: str | Path) -> dict[str, float]:
    done = ranks(SCRIPT, *arguments, processes=processes, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Checkpoints that two processes wrote at every stage and precision, and what forward then differed by."""
    folder = tmp_path_factory.mktemp("of_two")
    return folder, launch(folder, 2, "write", folder)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    assert integrity_errors(checkpoint) == []
    found: dict[str, torch.Tensor] = {}
    for stem in STEMS:
        reader = TensorReader(checkpoint, stem)
        found |= {f"{stem}: {name}": reader[name] for name in reader.names()}
    return found


def assert_same_bits(found: Path, wanted: Path) -> None:
    first, second = tensors(found), tensors(wanted)
    assert set(first) == set(second)
    different = [name for name in first if first[name].numpy().tobytes() != second[name].numpy().tobytes()]
    assert not different, (found, different[:5])


def test_two_processes_go_on_from_what_they_saved_as_if_undisturbed(of_two: tuple[Path, dict[str, float]]) -> None:
    folder, differs = of_two
    assert len(differs) == 8
    for case, by in differs.items():
        assert by < NEAR[case[2:]], case
    assert_goes_on_undisturbed(folder, differs)


def assert_goes_on_undisturbed(folder: Path, cases: Iterable[str]) -> None:
    for case in cases:
        undisturbed, resumed = (RunFolder(folder / name).checkpoint(3) for name in (case, f"{case}-again"))
        assert_same_bits(resumed, undisturbed)
        state = json.loads((resumed / "state.json").read_text())
        assert (state["optimizer_steps"], state["skipped_steps"]) == (3, 0)


@pytest.mark.long  # DeepSpeed compiles its AdamW for it, on a fresh machine
@pytest.mark.timeout(600)
def test_an_offloaded_optimizer_is_resumed_and_is_resumed_from_to_the_bit(tmp_path: Path) -> None:
    offloaded, there = tmp_path / "offloaded", tmp_path / "there"
    differs = launch(offloaded, 2, "offload", offloaded)
    assert len(differs) == 6 and all(by < NEAR[case[2:]] for case, by in differs.items())
    assert_goes_on_undisturbed(offloaded, differs)
    for name in launch(there, 3, "rewrite", offloaded, there):  # by optimizers that are not
        assert_same_bits(RunFolder(there / name).checkpoint(2), RunFolder(offloaded / name[:6]).checkpoint(2))


@pytest.mark.parametrize("processes", [1, 3])
def test_other_numbers_of_processes_stages_and_precisions_hold_what_was_saved(
    of_two: tuple[Path, dict[str, float]], processes: int, tmp_path: Path
) -> None:
    """2 → 1 and 2 → 3, and from what those write back to 2; each at other stages and in the other precision too."""
    folder, _ = of_two
    there, back = tmp_path / "there", tmp_path / "back"
    differs = launch(there, processes, "rewrite", folder, there)
    assert len(differs) == 8
    own = tmp_path / "own"
    launch(own, processes, "write", own)
    differs_back = launch(back, 2, "rewrite", own, back)
    for target, source, found in ((there, folder, differs), (back, own, differs_back)):
        for name, by in found.items():
            assert by < NEAR[name[-4:]], name
            before = RunFolder(source / name.split(" at ")[0]).checkpoint(2)
            assert_same_bits(RunFolder(target / name).checkpoint(2), before)


def test_a_checkpoint_in_parts_is_laid_out_as_others_read_it(of_two: tuple[Path, dict[str, float]]) -> None:
    folder, _ = of_two
    checkpoint = RunFolder(folder / "1-bf16").checkpoint(2)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert parts == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    held = {name: part for part in parts for name in load_file(checkpoint / part)}
    assert held == index["weight_map"] and not (checkpoint / "model.safetensors").exists()
    assert index["metadata"]["total_size"] >= sum(one.numel() * 4 for one in load_file(checkpoint / parts[0]).values())
