"""The model benchmark prints figures that are there, ratios of one run, and refuses in one sentence."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from torch import nn

from refiner_ds.attention.kernels import launch
from refiner_ds.benchmark import measure
from refiner_ds.benchmark.__main__ import BENCHMARKS, main
from refiner_ds.benchmark.measure import best_seconds, peak_bytes, saved_bytes
from refiner_ds.benchmark.model import Row, Setting, largest, table

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_model_gets_every_figure(capsys, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the interpreter would take minutes
    assert main(["model", "--depth", "2", "--img-size", "64", "--batch", "2", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["eager", "tiled", "vanilla ViT", "timm DeiT-S"]
    assert result["setting"]["img_size"] == 64
    for row in rows.values():
        assert row["forward_ms"] > 0 and row["training_ms"] > 0
        assert row["saved_mib_image"] > 0
        assert row["peak_mib"] > row["saved_mib_image"]
    kept = {name: row["saved_mib_image"] for name, row in rows.items()}
    assert kept["eager"] > max(kept["tiled"], kept["vanilla ViT"])  # of these two, so small a model decides nothing


def test_a_gpu_adds_triton_and_compiling_the_two_that_compilers_see(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    labels = [one.label for one in Setting("refiner_vit_l", 1, 64, "cuda", "bf16", compile=True).contenders()]
    plain = ["eager", "tiled", "triton", "vanilla ViT"]
    assert labels == [*plain, *(f"{label}, compiled" for label in plain)]


def test_the_table_gives_ratios_to_the_plain_twin_and_to_the_plain_composition():
    rows = [Row("eager", 10, 3.0, 4.0, 5.0, 6.0), Row("vanilla ViT", 9, 1.5, 1.0, 2.5, 2.0, largest=7)]
    lines = table(rows).splitlines()
    assert len(lines) == 3
    for ratio in ("2.00 x", "4.00 x", "2.00 x", "3.00 x"):
        assert ratio in lines[1]
    assert lines[2].count("1.00 x") == 4
    assert lines[2].split()[-3:] == ["4.00x", "2.00x", "7"]


@pytest.mark.parametrize("most", [0, 1, 2, 7, 16])
def test_the_largest_batch_that_fits_is_found(most):
    assert largest(lambda count: count <= most) == most


def test_a_large_batch_is_found_to_one_in_sixteen():
    assert 1000 * 15 / 16 <= largest(lambda count: count <= 1000) <= 1000


def test_saved_bytes_count_each_storage_once_and_no_weight():
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(32, 64)

    def forward():
        hidden = layer(x).relu()  # relu keeps its output, the next layer its input: one storage
        return layer(hidden)

    assert saved_bytes(forward, layer) == 2 * x.numel() * 4


def peak_of_ones(size: int) -> int:
    return peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)


@pytest.mark.slow
def test_peak_bytes_see_what_a_step_needs():
    size = 64 * 2**20
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # this process may hold freed memory of other tests
        peak = fresh.apply_async(peak_of_ones, (size,)).get(timeout=60)
    assert 0.98 * size < peak < 1.2 * size + 8 * 2**20


def test_the_best_of_interleaved_rounds_counts(monkeypatch):
    calls: list[str] = []
    clock = iter([3.0, 30.0, 1.0, 20.0, 2.0, 10.0])

    def timed(step, device):
        step()
        return next(clock)

    monkeypatch.setattr(measure, "seconds_of", timed)
    assert best_seconds([lambda: calls.append("a"), lambda: calls.append("b")], 3, CPU) == [1.0, 10.0]
    assert calls == ["a", "b"] * 4  # one round to warm up


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ([], f"refiner_ds.benchmark: no subcommand is given; it must be one of {', '.join(BENCHMARKS)}"),
        (["speed"], f"refiner_ds.benchmark: speed is not a subcommand; it must be one of {', '.join(BENCHMARKS)}"),
        (["model", "--rounds", "0"], "--batch and --rounds must be 1 or more"),
        (["model", "--largest", "9"], "--largest measures the memory of a GPU; leave it out, or give --device cuda"),
        (["model", "--img-size", "100"], "img_size 100x100 is not a multiple of patch_size 16; near are 96 and 112"),
    ],
)
def test_refusals_are_one_sentence(line, sentence, capsys):
    assert main(line) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
