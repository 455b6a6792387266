"""A plan says what a run will take, whether it fits, and what to change where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from refiner_ds.plan.__main__ import main

# A quarter of L's blocks, each in four times the images: the memory of L in a quarter of the operations.
FEWER = (
    "refiner.model.depth=8", "refiner.model.cos_reg_pairs=null", "train_batch_size=1536",
    "train_micro_batch_size_per_gpu=48",
)  # fmt: skip
L448 = ("--config", "ds_configs/refiner_l_448.json", *(word for key in FEWER for word in ("--set", key)))


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_adds_up_and_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    given = (*L448, "--nodes", "4", "--gpus-per-node", "8", "--gpu", "h200", "--price", "2", "--step-seconds", "0.5")
    found = plan(capsys, *given)
    memory, cost = found["memory"], found["cost"]
    assert found["processes"] == 32 and found["batch"] == {"global": 1536, "micro": 48, "accumulation": 1}
    assert memory["needed"] == sum(memory["parts"].values()) < memory["capacity"] and memory["fits"]
    assert sum(memory["activations"].values()) == memory["parts"]["activations"]
    assert memory["largest_micro_batch"] >= memory["largest_dividing_micro_batch"] == 48
    assert cost["hours"] == cost["steps"] * 0.5 / 3600
    assert cost["money"] == 2 * cost["gpu_hours"] == 2 * 32 * cost["hours"]
    assert main(list(given)) == 0
    told = capsys.readouterr().out
    assert "of 139.70: fits" in told and "500.0 ms as given" in told and "GPU-hours" in told


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_a_run_with_dropout_of_its_maps_is_planned_too(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    with_dropout, without = (plan(capsys, "--gpu", gpu, "--set", f"refiner.model.attn_drop={p}") for p in (0.1, 0))
    assert with_dropout["memory"]["parts"]["weights"] == without["memory"]["parts"]["weights"]
    assert with_dropout["memory"]["activations"]["heads, loss and checkpoints"] > 0


def test_eager_compiled_is_planned_as_eager(capsys: pytest.CaptureFixture[str]) -> None:
    small = [word for key in ("depth=2", "num_heads=2", "embed_dim=16") for word in ("--set", f"refiner.model.{key}")]
    one, other = (
        plan(capsys, "--gpu", "h100", *small, "--set", f"refiner.model.attention={name}")
        for name in ("eager compiled", "eager")
    )
    assert one["memory"] == other["memory"] and one["attention"] == "eager"


def test_what_does_not_fit_comes_with_what_would_help_and_by_how_much(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINER_ATTENTION", "tiled")
    keys = (
        "train_micro_batch_size_per_gpu=96",
        "refiner.model.checkpointing=none",
        "refiner.model.save_for_backward=map",
    )
    given = [*L448, "--gpu", "rtx-4090", *(word for key in keys for word in ("--set", key))]
    found = plan(capsys, *given)["memory"]
    assert not found["fits"] and found["largest_micro_batch"] < 96
    settings = {remedy["set"]: remedy for remedy in found["remedies"]}
    assert {"train_micro_batch_size_per_gpu=48", "refiner.model.checkpointing=pair"} <= settings.keys()
    assert [r["saves"] for r in found["remedies"]] == sorted((r["saves"] for r in found["remedies"]), reverse=True)
    remedy = settings["refiner.model.checkpointing=pair"]
    changed = plan(capsys, *given, "--set", remedy["set"])["memory"]
    assert found["needed"] - changed["needed"] == remedy["saves"] and changed["fits"] == remedy["fits"]


def test_zero_stages_hold_less_and_send_more(capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        plan(
            capsys, "--gpus-per-node", "8", "--set", f"zero_optimization.stage={stage}", "--set", "train_batch_size=64"
        )
        for stage in (0, 1, 2, 3)
    ]
    parts = [one["memory"]["parts"] for one in stages]
    assert parts[0]["optimizer"] > parts[1]["optimizer"] == parts[2]["optimizer"]
    assert parts[1]["gradients"] == pytest.approx(8 * parts[2]["gradients"], abs=8)
    assert stages[3]["step"]["sent"] == pytest.approx(1.5 * stages[2]["step"]["sent"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--gpu", "voodoo2"), "GPU voodoo2 is not in the table"),
        (("--nodes", "0"), "--nodes 0: must be above 0"),
        (("--config", "nowhere.json"), "nowhere.json"),
        (("--gpus-per-node", "7"), "7"),
    ],
)
def test_a_plan_for_nothing_real_is_refused(
    given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(given)) == 2
    told = capsys.readouterr().err
    assert words in told and told.startswith("error: ") and told.count("\n") == 1
