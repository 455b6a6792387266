"""The attention benchmark prints every backend side by side, draws if asked to, and refuses in one sentence."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from refiner_ds.attention import choice
from refiner_ds.benchmark import attention as attention_benchmark
from refiner_ds.benchmark.__main__ import main
from refiner_ds.benchmark.attention import CASES, Layer, Row, Setting, table

SMALL = ["attention", "--tokens", "9", "17", "--batch", "2", "--heads", "2", "--width", "4", "--rounds", "1"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_backend_gets_every_figure_and_a_picture(dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_benchmark, "_kernels_support", lambda layer, case: False)
    assert main([*SMALL, "--dtype", dtype, "--device", "cpu", "--plot", str(tmp_path / "a.png"), "--json"]) == 0
    every = json.loads(capsys.readouterr().out)["rows"]
    rows = [row for row in every if not row["backend"].startswith("auto: ")]
    chosen = [row for row in every if row["backend"].startswith("auto: ")]
    assert [(row["tokens"], row["case"]) for row in chosen] == [
        (n, c) for n in (9, 17) for c in ("linear", "bottleneck")
    ]
    for row in chosen:  # it is one of the others
        same = [one for one in rows if "auto: " + one["backend"] == row["backend"] and one["case"] == row["case"]]
        assert row["training_ms"] in [one["training_ms"] for one in same]
    backends = [
        (case, label) for case, backends in CASES.items() for label, backend, _ in backends if backend != "triton"
    ]
    assert [(row["tokens"], row["case"], row["backend"]) for row in rows] == [
        (n, *backend) for n in (9, 17) for backend in backends
    ]
    for row in rows:
        assert row["training_ms"] > 0 and row["evaluation_ms"] > 0 and row["saved_mib_image"] > 0
        assert row["moved_entry"] >= row["uncached_entry"] >= 0 and row["moved_entry"] > 1
        assert 0 < row["output_error"] < (1e-5 if dtype == "fp32" else 0.05)
    saved = {(row["case"], row["backend"]): row["saved_mib_image"] for row in rows if row["tokens"] == 17}
    assert saved["linear", "tiled"] < saved["linear", "eager"] / 3
    assert (
        saved["bottleneck", "tiled, map"] < saved["bottleneck", "tiled, activations"] < saved["bottleneck", "eager"] / 2
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 800


def test_nothing_is_written_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention_benchmark, "_kernels_support", lambda layer, case: False)
    assert main([*SMALL[:1], "--tokens", "9", *SMALL[4:], "--device", "cpu"]) == 0
    assert "output error" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_table_gives_ratios_to_eager_of_the_same_size():
    rows = [
        Row(9, "linear", "eager", 4.0, 2.0, 8.0, 400.0, 390.0, 1e-7, 1e-6),
        Row(9, "linear", "tiled", 1.0, 1.0, 1.0, 300.0, 7.5, 2e-7, 3e-6),
        Row(17, "linear", "eager", 8.0, 4.0, 16.0, 400.0, 390.0, 1e-7, 1e-6),
    ]
    lines = table(rows).splitlines()
    for figure in ("0.25 x", "0.50 x", "0.12 x", "300.00 ( 0.75 x)", " 7.5 ", "2.0e-07", "3.0e-06"):
        assert figure in lines[2]
    assert lines[1].count("1.00 x") == lines[3].count("1.00 x") == 4


@pytest.mark.parametrize("supported", [False, True])
def test_kernels_are_measured_where_they_support_the_case_and_nowhere_else(supported, monkeypatch):
    monkeypatch.setattr(attention_benchmark, "_kernels_support", lambda layer, case: supported and case == "linear")
    backends = attention_benchmark._candidates(Layer(Setting(1, 2, 4), 5))
    assert [backend for _, backend, _ in backends["linear"]] == ["eager", "tiled", "triton"][: 2 + supported]
    assert {backend for _, backend, _ in backends["bottleneck"]} == {"eager", "tiled"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "0"], "--batch, --heads, --width, --ratio and --rounds must be 1 or more, --tokens 2"),
        (["--tokens", "1"], "--batch, --heads, --width, --ratio and --rounds must be 1 or more, --tokens 2"),
        (["--plot", "/nowhere/a.png"], "--plot /nowhere/a.png: its folder does not exist"),
    ],
)
def test_refusals_are_one_sentence(options, sentence, capsys):
    assert main(["attention", *options]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(("best", "like"), [("triton[tall]", "triton, activations"), ("eager compiled", "eager")])
def test_a_choice_without_a_row_of_its_own_has_its_backends_bytes_and_its_own_time(best, like, monkeypatch):
    found = [choice.Candidate("tiled", milliseconds=8.0), choice.Candidate(best, milliseconds=6.0)]
    monkeypatch.setattr(choice, "measure", lambda *_: choice.Measured("bottleneck", 3, found))
    names = ["eager", "tiled, activations", "triton, activations"]
    rows = [
        Row(9, "bottleneck", name, 5.0, evaluation, saved, 1.0, 1.0, 0.0, 0.0)
        for name, evaluation, saved in zip(names, (1.0, 2.0, 3.0), (10.0, 20.0, 30.0), strict=True)
    ]
    row = attention_benchmark._chosen(Layer(Setting(1, 2, 4), 9), "bottleneck", rows)
    same = next(one for one in rows if one.backend == like)
    assert row.backend == f"auto: {best}" and row.training_ms == 2.0
    assert (row.saved_mib_image, row.evaluation_ms) == (same.saved_mib_image, 2.0)
