"""Under DeepSpeed: its checkpoint is exact, statistics stay fp32 at every ZeRO stage, initialisation survives."""

from __future__ import annotations

import json

import pytest

from tests.training.launched import ranks

STAGES = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def results() -> dict:
    """What deepspeed_cases.py found, in a process of its own: DeepSpeed leaves a process group behind."""
    # The first run on a machine compiles DeepSpeed's shared-memory operator.
    done = ranks("-m", "tests.models.deepspeed_cases", processes=1, timeout=240)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.parametrize("unit", ["pair", "block", "refiner"])
@pytest.mark.parametrize("layout", ["released", "paper"])
def test_deepspeeds_checkpoint_is_bit_identical_to_none(results, layout, unit):
    assert results["recompute"][f"{layout} {unit}"] == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_trains_as_a_plain_fp32_loop_does(results, stage):
    engine, plain = results["fp32"][stage], results["fp32 loop"]
    assert engine["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert engine["running_var"] == pytest.approx(plain["running_var"], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_running_statistics_are_fp32_and_counted_once_with_bf16_parameters(results, stage):
    engine, plain = results["bf16"][stage], results["fp32 loop"]
    assert engine["statistics"] == ["torch.float32"]
    assert engine["counted"] == [3]  # one a step, although each block is recomputed
    assert engine["losses"] == pytest.approx(plain["losses"], rel=0.05)


def test_initialisation_survives_zero_init(results):
    sharded, whole = results["init"]["zero.Init"], results["init"]["plain"]
    assert sharded.keys() == whole.keys()
    assert sharded == pytest.approx(whole, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("wrapped", ["root", "blocks", "layers"])
def test_fsdp2_gives_the_plain_gradients_whatever_it_wraps(results, wrapped):
    assert results["fsdp2"][wrapped] < 1e-4


def test_a_plain_ddp_loop_trains_class_logits(results):
    first, second, third = results["ddp"]
    assert first > second > third
