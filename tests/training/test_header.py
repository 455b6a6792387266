"""A run begins by saying what it trains, on what, how, and for how long."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.config import load
from refiner_ds.training.attention_cases import attention_line
from refiner_ds.training.build import build_model
from refiner_ds.training.header import header
from refiner_ds.training.preparation import prepare
from refiner_ds.training.schedule import Schedule
from refiner_ds.training.world import World


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("header")
    places = [f"refiner.run.output={folder}/runs", f"refiner.data.cache={folder}/cache"]
    run = load(None, [*places, "refiner.model.checkpointing=pair"])
    return header(prepare(run, 2), World(0, 2, 0, torch.device("cpu")), bf16=False)


@pytest.mark.parametrize(
    "about, words",
    [
        ("model", ("refined_vit at 28 px", "171,060 parameters", "GFLOP an image")),
        ("batch", ("48 images a step = 2 processes × 24 at once × 1 accumulated",)),
        ("engine", ("2 processes on CPU", "fp32", "ZeRO stage 1", "recomputing pairs of blocks")),
        ("attention", ("map: tiled, bottleneck: tiled (tiled is the default on CPUs)",)),
        ("training", ("1,433 samples, 10 classes", "no score maps")),
        ("validation", ("364 samples, 10 classes",)),
        ("steps", ("30 an epoch, 390 in all", "learning rate 0.003 at its peak")),
        ("run folder", ("/runs/quickstart",)),
    ],
)
def test_the_header_says(lines: dict[str, str], about: str, words: tuple[str, ...]) -> None:
    assert all(word in lines[about] for word in words), lines[about]


@pytest.mark.parametrize(
    "keys, processes, said",
    [
        (["sync_batch_norm=true"], 2, "bottleneck: eager, because its batch norms take statistics over ranks"),
        (["sync_batch_norm=true"], 1, "bottleneck: tiled"),  # there is nobody to synchronise with
        (["refiner=linear"], 2, "linear: tiled"),
        (["layout=paper", "refiner=linear", "constraint=spatial"], 2, "linear: "),
        (["refiner=none", "layout=paper"], 2, "attention: PyTorch's fused kernels"),
        (["attention=eager"], 2, "map: eager, bottleneck: eager (eager is asked for)"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_header_says_what_computes_each_kind_of_attention(
    keys: list[str], processes: int, said: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(None, [f"refiner.model.{key}" for key in keys])
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    if run.refiner.model.attention != "auto":
        monkeypatch.setenv("REFINER_ATTENTION", run.refiner.model.attention)
    with torch.device("meta"):
        model = build_model(run, 10)
    line = attention_line(run, model, World(0, processes, 0, torch.device("cpu")), dtype)
    assert said in line


@pytest.mark.parametrize(
    "epochs, step, shown", [(0.2, 1, "0.033"), (0.2, 6, "0.200"), (1.5, 1, "0.03"), (12, 45, "1.5"), (300, 45, "1.5")]
)
def test_an_epoch_has_digits_enough_for_short_runs_and_no_more(epochs: float, step: int, shown: str) -> None:
    run = load(
        None, [f"refiner.recipe.epochs={epochs}", "refiner.recipe.warmup_epochs=0", "refiner.recipe.cooldown_epochs=0"]
    )
    schedule = Schedule(run.refiner.recipe, run.batch(2), 1433)
    assert schedule.epoch_shown(step / schedule.steps_an_epoch) == shown
