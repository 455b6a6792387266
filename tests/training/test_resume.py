"""A run stopped anywhere and started again takes the course it would have taken, to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from refiner_ds.checkpoint.files import integrity_errors, read_classes, read_weights
from refiner_ds.config import load
from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.build import build_model
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.preparation import prepare
from refiner_ds.training.resuming import config_before, refuse_unfit_checkpoint
from tests.training.launched import ROOT, environment, ranks, running_ranks

TRAIN = ROOT / "refiner_ds" / "train.py"
# Dropout, drop-path, mixing and random crops on, drawn again in recomputed blocks: all of it has to come back. Of few
# patches: maps of fifty tokens take most of a tiny model's time.
TINY = {
    "refiner.model.depth": 2, "refiner.model.embed_dim": 16, "refiner.model.num_heads": 2,
    "refiner.model.patch_size": 14, "refiner.model.stem_chs": [4, 4, 4], "refiner.model.drop": 0.1,
    "refiner.model.drop_path": 0.1, "refiner.model.checkpointing": "pair",
    "refiner.recipe.mixup": 0.8, "refiner.recipe.cutmix": 1.0, "refiner.recipe.epochs": 1,
    "refiner.recipe.warmup_epochs": 0.1, "refiner.recipe.cooldown_epochs": 0, "refiner.run.log_steps": 1,
    "refiner.run.checkpoint_epochs": 0.2, "refiner.run.eval_epochs": 1, "refiner.run.keep_checkpoints": 9,
    "refiner.run.picture_epochs": None,
}  # fmt: skip


def arguments(output: Path, **more: object) -> list[str]:
    keys = {**TINY, "refiner.run.output": str(output), **more}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    done = ranks(TRAIN, *arguments(output))
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "quickstart"


def same_course(run: Path, whole: Path) -> None:
    assert read_state(newest(run)).step == 30
    for weights in ("model.safetensors", "ema.safetensors"):
        assert (newest(run) / weights).read_bytes() == (newest(whole) / weights).read_bytes()
    numbers = [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in read_metrics(run, "train")]
    assert numbers == [
        (line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in read_metrics(whole, "train")
    ]
    assert [line["step"] for line in read_metrics(run, "train")] == list(range(1, 31))


def newest(run: Path) -> Path:
    latest = RunFolder(run).latest_checkpoint()
    assert latest is not None
    return latest


def test_one_signalled_rank_makes_all_save_and_leave_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    with running_ranks(TRAIN, *arguments(tmp_path)) as training:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run, "train")) >= 3, training)
        os.kill(pid_of_rank(run, 1), signal.SIGUSR2)
        done = training.result()
    assert "asked to stop: saved step" in done.stdout and done.returncode == 75, done.stdout + done.stderr
    stopped_at = read_state(newest(run)).step
    assert 3 <= stopped_at < 30
    again = ranks(TRAIN, *arguments(tmp_path))
    assert again.returncode == 0 and f"(step {stopped_at}," in again.stdout
    same_course(run, whole)


def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_continues(whole: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(whole), str(tmp_path)], check=True)
    run = tmp_path / "quickstart"
    (run / "complete.json").unlink()
    for step, damage in ((30, "cut"), (24, "flip"), (18, "lose")):
        spoil(run / "checkpoints" / f"step_{step:08d}", damage)
    (run / "checkpoints" / ".writing_step_00000036").mkdir()  # as a process killed while saving leaves it
    again = ranks(TRAIN, *arguments(tmp_path))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "step_00000012 (step 12," in again.stdout
    told = re.findall(r"skipped: \S+step_000000(\d\d)\S+: (.+)", again.stdout)
    assert [step for step, _ in told] == ["18", "24", "30"] and told[0][1] == "missing"
    same_course(run, whole)
    assert not list((run / "checkpoints").glob(".writing_*"))


def test_another_number_of_processes_draws_the_same_samples_and_views(tmp_path: Path) -> None:
    """2, then 1, then 3 processes against 2 undisturbed: what every step is made of, its schedule, and the record.

    At last with another weight decay and ZeRO stage, which take effect and are recorded.
    """
    keys = {"refiner.recipe.epochs": 0.6, "refiner.run.checkpoint_epochs": 1, "refiner.data.val": None}
    for name, starts in (("straight", [(2, 0)]), ("changed", [(2, 6), (1, 12), (3, 0)])):
        for processes, stop_before in starts:
            command = [Path(__file__).with_name("keys_script.py"), tmp_path / f"{name}.log", str(stop_before)]
            changed_keys = {"refiner.recipe.weight_decay": 0.3, "zero_optimization.stage": 2} if processes == 3 else {}
            more = arguments(tmp_path, **keys, **changed_keys, **{"refiner.run.name": name})
            done = ranks(*command, *more, processes=processes)
            assert done.returncode == 0 or stop_before, done.stdout[-2000:] + done.stderr[-3000:]
    straight, changed = (made_of(tmp_path, name) for name in ("straight", "changed"))
    assert sorted(straight) == list(range(18)) and changed == straight
    lrs = [
        [(line["step"], line["lr"]) for line in read_metrics(tmp_path / name, "train")]
        for name in ("straight", "changed")
    ]
    assert lrs[0] == lrs[1]
    history = [json.loads(line) for line in (tmp_path / "changed" / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["world_size"]) for line in history] == [(0, 2), (8, 1), (14, 3)]  # a step after asking
    assert [len(line["processes"]) for line in history] == [2, 1, 3]
    assert [line["zero_stage"] for line in history] == [1, 1, 2]
    changes = {"refiner.recipe.weight_decay": [0.05, 0.3], "zero_optimization.stage": [1, 2]}
    assert [line["changed"] for line in history] == [{}, {}, changes]
    assert "changed: refiner.recipe.weight_decay from 0.05 to 0.3" in done.stdout
    decays = {line["step"]: line["weight_decay"] for line in logged_lines(tmp_path, "changed")}
    assert decays[13] == [0.0, 0.05] and decays[14] == [0.0, 0.3]


def made_of(folder: Path, name: str) -> dict[int, list[tuple[int, int]]]:
    """Samples and checksums of their views by step, in the order of samples, over all ranks."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for line in logged_lines(folder, name):
        steps.setdefault(line["step"], []).extend(zip(line["samples"], line["views"], strict=True))
    return {step: sorted(found) for step, found in steps.items()}


def logged_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob(f"{name}.log.*") for line in file.read_text().splitlines()]


BARE = """
import json, sys
import timm, torch
from safetensors.torch import load_file
import refiner_ds.models

folder, options = sys.argv[1], json.loads(sys.argv[2])
for which in ("model", "ema"):
    model = timm.create_model("refined_vit", **options).eval()
    model.load_state_dict(load_file(f"{folder}/{which}.safetensors"))
    with torch.no_grad():
        torch.save(model(torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)), f"{sys.argv[3]}/{which}.pt")
assert not {"deepspeed", "refiner_ds.training", "refiner_ds.checkpoint"} & set(sys.modules)
"""


def test_weights_load_in_a_bare_timm_with_equal_logits(whole: Path, tmp_path: Path) -> None:
    checkpoint = newest(whole)
    keys = load(checkpoint / "config.json")
    skip = {"name", "attention", "save_for_backward", "checkpointing"}
    options = {
        key: value for key, value in keys.refiner.model.model_dump(exclude_defaults=True).items() if key not in skip
    }
    options["num_classes"] = len(read_classes(checkpoint))
    options["drop_path_rate"], options["proj_drop_rate"] = options.pop("drop_path"), options.pop("drop")
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(checkpoint), json.dumps(options), str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    images = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
    for which in ("model", "ema"):
        model = build_model(keys, 10).eval()
        model.load_state_dict(read_weights(checkpoint, which))
        with torch.no_grad():
            assert torch.equal(model(images), torch.load(tmp_path / f"{which}.pt"))


@pytest.mark.parametrize("damage", [b"[]", b"{}", b"", b"\0" * 9, b'{"refiner": {"mod'])
def test_a_damaged_run_file_or_summary_is_made_again_from_the_newest_checkpoint(
    whole: Path, tmp_path: Path, damage: bytes
) -> None:
    subprocess.run(["cp", "-r", str(whole), str(tmp_path)], check=True)
    run = RunFolder(tmp_path / "quickstart")
    run.config.write_bytes(damage)
    run.complete.write_bytes(damage)
    assert config_before(run) == json.loads((newest(run.path) / "config.json").read_text())
    same = load(newest(run.path) / "config.json", [f"refiner.run.output={tmp_path}"])
    assert prepare(same, 2).finished() is None  # so that it resumes, evaluates and writes its summary anew
    other = load(newest(run.path) / "config.json", [f"refiner.run.output={tmp_path}", "refiner.run.seed=1"])
    with pytest.raises(ConfigError, match="holds a run with refiner.run.seed 42, not 1"):
        prepare(other, 2)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigError, match="config.json: is damaged, and no checkpoint has a copy") as said:
        prepare(same, 2)
    assert "delete" not in str(said.value)


def test_a_checkpoint_of_another_shape_or_other_classes_is_refused_before_anything_is_written(
    whole: Path, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", str(whole), str(tmp_path)], check=True)
    run = RunFolder(tmp_path / "quickstart")
    run.complete.unlink()
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    same = load(newest(run.path) / "config.json", [f"refiner.run.output={tmp_path}"])
    shapes = {name: one.shape for name, one in build_model(same, 10).state_dict().items()}
    digits = [str(digit) for digit in range(10)]
    refuse_unfit_checkpoint(run, shapes, digits)
    with pytest.raises(CheckpointError, match=r"holds \(10,\) of head.bias and the model \(9,\)"):
        refuse_unfit_checkpoint(run, {**shapes, "head.bias": torch.Size([9])}, digits)
    with pytest.raises(CheckpointError, match="holds nothing of new and the model"):
        refuse_unfit_checkpoint(run, {**shapes, "new": torch.Size([9])}, digits)
    with pytest.raises(CheckpointError, match="class 3 was 3 and is three"):
        refuse_unfit_checkpoint(run, shapes, ["0", "1", "2", "three", *digits[4:]])
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


def spoil(checkpoint: Path, damage: str) -> None:
    assert not integrity_errors(checkpoint)
    part = checkpoint / "optimizer.safetensors"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "flip":
        raw = bytearray(part.read_bytes())
        raw[len(raw) // 2] ^= 1
        part.write_bytes(raw)
    else:
        part.unlink()
    assert len(integrity_errors(checkpoint)) == 1


def pid_of_rank(run: Path, rank: int) -> int:
    found = re.search(r"process (\d+)", (run / "logs" / f"rank_{rank}.log").read_text())
    assert found
    return int(found[1])


def wait_for(true: Callable[[], bool], training: Future[subprocess.CompletedProcess[str]], seconds: float = 90) -> None:
    """Wait while ranks run."""
    end = time.monotonic() + seconds
    while not true():
        assert not training.done(), training.result()
        assert time.monotonic() < end
        time.sleep(0.05)
