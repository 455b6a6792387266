"""What goes into a step: parameter groups, inputs, losses; and what is told of it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import get_gradient_clipping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refiner_ds.config import load
from refiner_ds.data.batch import Batch
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.build import build_model, parameter_count, training_flops
from refiner_ds.training.engine import build_optimizer, deepspeed_config
from refiner_ds.training.inputs import InputMaker
from refiner_ds.training.losses import soft_cross_entropy, token_label_loss
from refiner_ds.training.metrics import Metrics, read_metrics
from tests.training.launched import ROOT, environment


def test_weight_decay_spares_what_the_recipe_spares() -> None:
    run = load()
    model = build_model(run, 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(run, model).param_groups
    spared = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert {"pos_embed", "cls_token", "head.bias", "blocks.0.norm1.weight", "blocks.0.mlp.scale_channel"} <= spared
    assert {"head.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.DLA.conv_exp.weight"} <= decayed
    assert len(spared) + len(decayed) == len(names)


@pytest.mark.parametrize("asked, done", [("null", 0.0), ("0", 0.0), ("0.5", 0.5)])
def test_gradients_are_clipped_as_asked_and_not_otherwise(asked: str, done: float) -> None:
    run = load(None, [f"gradient_clipping={asked}"])
    assert get_gradient_clipping(deepspeed_config(run, run.batch(2), False, 1000)) == done


def a_batch(count: int = 6) -> Batch:
    images = torch.randint(0, 256, (count, 28, 28, 3), dtype=torch.uint8)
    return Batch(images, torch.arange(count), torch.arange(count), torch.ones(count, dtype=torch.bool))


def inputs_of(*overrides: str, seed: int = 3):
    keys = load(None, list(overrides)).refiner
    return InputMaker(keys, 10, (7, 7), torch.float32)(a_batch(), seed)


def test_the_class_target_is_mixed_by_the_share_of_mix_tokens_box() -> None:
    made = inputs_of("refiner.recipe.label_smoothing=0")
    y0, x0, y1, x1 = made.box
    kept = 1 - (y1 - y0) * (x1 - x0) / 49
    assert 0 < kept < 1
    for image in range(6):
        wanted = torch.zeros(10)
        wanted[image] += kept
        wanted[5 - image] += 1 - kept
        torch.testing.assert_close(made.target_BC[image], wanted)
        assert (made.target_BPC[image, :, image] == 1).all()  # patch logits come back to their own image


def test_inputs_follow_from_their_seed_alone() -> None:
    mixing = ("refiner.recipe.mixup=0.8", "refiner.recipe.cutmix=1.0")
    torch.manual_seed(1)
    batch = a_batch()
    make = InputMaker(load(None, list(mixing)).refiner, 10, (7, 7), torch.float32)
    first = make(batch, 11)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first[::2], make(batch, 11)[::2], strict=True))
    assert make(batch, 12).box != first.box


def test_the_loss_is_the_weighted_sum_of_class_and_mean_patch_cross_entropy() -> None:
    cls_BC, patch_BPC = torch.randn(3, 5), torch.randn(3, 7, 5)
    target_BC, target_BPC = torch.rand(3, 5).softmax(-1), torch.rand(3, 7, 5).softmax(-1)
    losses = token_label_loss(cls_BC, patch_BPC, target_BC, target_BPC, 0.9, 0.5)
    by_hand = [-(target_BC[b] * cls_BC[b].log_softmax(-1)).sum() for b in range(3)]
    patches = [-(target_BPC[b, p] * patch_BPC[b, p].log_softmax(-1)).sum() for b in range(3) for p in range(7)]
    torch.testing.assert_close(losses.parts["cls"], sum(by_hand) / 3)
    torch.testing.assert_close(losses.parts["patch"], sum(patches) / 21)
    torch.testing.assert_close(losses.total, 0.9 * losses.parts["cls"] + 0.5 * losses.parts["patch"])


def test_losses_are_computed_in_fp32() -> None:
    logits = torch.full((1, 1000), 8.0, dtype=torch.bfloat16)
    assert float(soft_cross_entropy(logits, torch.full((1, 1000), 1e-3))) == pytest.approx(6.9077, abs=1e-3)


def test_flops_are_those_of_the_architecture() -> None:
    run = load(ROOT / "ds_configs" / "refiner_s_relabel.json")
    assert training_flops(run, 1000) / 3 / 2 == pytest.approx(6.8e9, rel=0.05)  # multiply-adds of one forward
    with torch.device("meta"):
        assert parameter_count(build_model(run, 1000)) == 25_408_656


def test_resuming_drops_what_was_logged_beyond_the_checkpoint(tmp_path: Path) -> None:
    first = Metrics(RunFolder(tmp_path), 0)
    for step in (1, 2, 3, 4):
        first.write("train", step, step / 10, step * 48, loss=float(step))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as torn:
        torn.write('{"kind": "train", "st')  # as a killed process leaves it
    again = Metrics(RunFolder(tmp_path), 2)
    again.write("train", 3, 0.3, 144, loss=float("nan"))
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, None)]


def test_resuming_hides_what_tensorboard_was_shown_beyond_the_checkpoint(tmp_path: Path) -> None:
    for first, last in ((1, 4), (1, 3), (2, 3)):  # killed before anything was saved, then after step 1 was
        metrics = Metrics(RunFolder(tmp_path), first - 1)
        for step in range(first, last + 1):
            metrics.write("train", step, step / 10, step * 48, loss=float(step))
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


CONSOLE = """
import logging, warnings
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import Console
from refiner_ds.training.logs import silence_libraries, write_logs
silence_libraries(); write_logs(RunFolder("."), 0)
console = Console(True, total_steps=100)
for step in range(1, 31):
    console.progress(step, step, {"step": f"{step}/100", "loss": "1.0"}, logged=step % 10 == 0)
    if step == 15:
        warnings.warn("a library warns")
        logging.getLogger("DeepSpeed").warning("DeepSpeed warns")
console.print("it is over")
console.done()
"""


def test_a_pipe_gets_plain_lines_and_warnings_go_to_the_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONSOLE], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/100", "step 20/100", "step 30/100", "it is over"]
    assert done.stderr == "" and "\r" not in done.stdout
    logged = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "a library warns" in logged and "DeepSpeed warns" in logged and "step 20/100" in logged


def test_a_terminal_gets_one_line_that_is_redrawn(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", CONSOLE], cwd=tmp_path, env=environment(), stdout=theirs)
    os.close(theirs)
    assert process.wait(60) == 0
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    assert seen.count("\n") == 1 and "it is over" in seen
    assert seen.count("\r\x1b[K") >= 3 and "left" in seen


def test_on_a_narrow_terminal_the_progress_line_is_still_one(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", CONSOLE], cwd=tmp_path, stdout=theirs,
        env={name: value for name, value in environment().items() if name != "COLUMNS"},
    )  # fmt: skip
    os.close(theirs)
    assert process.wait(60) == 0
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    drawn = [line for line in seen.split("\r\x1b[K") if line and "it is over" not in line]
    assert len(drawn) >= 3 and max(map(len, drawn)) == 19
