"""A sweep of fine-tunings runs what is missing and nothing else, and what they found can be looked into."""

from __future__ import annotations

import csv
import json
import subprocess

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from transformers import AutoModelForMaskedLM

from refiner_ds.analysis.map_statistics import head_similarity
from refiner_ds.text import add_refiner, sweep
from refiner_ds.text.features import layer_features
from refiner_ds.text.features import main as features
from refiner_ds.text.pretrain import learn_tokenizer
from tests.text.encoders import KEYS, encoder, inputs, move_weights
from tests.text.glue_files import WORDS, write_task


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer([" ".join(WORDS)] * 20, 100)


@pytest.fixture
def table(tmp_path, tokenizer, monkeypatch):
    """A table of two rows, one task and two seeds; commands of its runs are noted, and write their results."""
    tokenizer.save_pretrained(tmp_path / "words")
    for name in ("plain", "refined"):
        text = {"model": {"model_type": "bert", **KEYS}, "tokenizer": str(tmp_path / "words")}
        refiner = {} if name == "plain" else {"refiner": {"kind": "linear", "expansion_ratio": 2}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": {**text, **refiner}}))
    rows = [{"label": name, "config": f"{name}.json"} for name in ("plain", "refined")]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows, "tasks": ["sst2"], "seeds": [0, 1]}))
    write_task(tmp_path, "sst2")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "table.json"


def swept(table, *words):
    return sweep.main([str(table), "--data", str(table.parent), *words])


def test_a_sweep_runs_what_is_missing(table, monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command)
        if len(commands) < 3:
            place = sweep.read_glue_table(table).runs(table.parent / "out")[len(commands) - 1].folder
            place.mkdir(parents=True)
            (place / "results.json").write_text(json.dumps({"score": 50.0, "dev": {}}))
        return subprocess.CompletedProcess(command, 0 if len(commands) < 3 else 7)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    output = ["--output", str(table.parent / "out")]
    assert swept(table, *output) == 7 and len(commands) == 3  # the third failed, and the fourth was not begun
    last = commands[2]
    assert last[1:4] == ["-m", "refiner_ds.text.glue", "--task"] and last[last.index("--config") + 1].endswith(
        "refined.json"
    )
    assert last[last.index("--seed") + 1] == "0" and last[-1] == output[1]
    capsys.readouterr()
    assert swept(table, *output, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["score 50.00"] * 2 + ["not run yet"] * 2
    assert lines[3].startswith("run 4 of 4: refined/sst2/seed_1")
    assert swept(table, *output, "--only", "1", "--dry-run") == 0
    assert capsys.readouterr().out == "run 1 of 1: plain/sst2/seed_1, score 50.00\n"
    assert swept(table, *output, "--only", "3", "--processes", "2") == 7
    assert commands[-1][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_a_sweep_is_refused_before_its_first_run(table, monkeypatch, capsys):
    monkeypatch.setattr(sweep.subprocess, "run", lambda command: pytest.fail("nothing may run"))
    assert swept(table, "--only", "4") == 2 and "has the runs 0 to 3" in capsys.readouterr().err
    assert swept(table, "--processes", "0") == 2 and "at least one" in capsys.readouterr().err
    (table.parent / "refined.json").unlink()
    assert swept(table) == 2 and "refined.json: no such run file" in capsys.readouterr().err
    (table.parent / "SST-2/dev.tsv").unlink()
    (table.parent / "refined.json").write_text((table.parent / "plain.json").read_text())
    assert swept(table) == 2 and "dev.tsv: no such file" in capsys.readouterr().err


def test_features_of_layers_and_maps_before_and_after_refining():
    given, _ = inputs("bert")
    words = given["input_ids"].clamp(max=50)
    plain = encoder("bert", attn_implementation="eager").eval()
    before = layer_features("plain", plain, iter([words, words.flip(1)]))
    begun = layer_features("refined", add_refiner(plain).eval(), iter([words, words.flip(1)]))
    assert [row["layer"] for row in before] == list(range(1, len(before) + 1)) and before[-1]["cka_last"] == 1
    for ours, theirs in zip(before, begun, strict=True):  # an identity
        numbers = [name for name in ours if name != "model"]
        assert [ours[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers], rel=1e-6)
        assert ours["head_similarity"] == ours["refined_head_similarity"]
        assert 0 < ours["entropy"] <= torch.tensor(words.shape[1]).log() + 1e-6
    move_weights(plain, 0.3)
    moved = layer_features("moved", plain, iter([words, words + 1]))
    found = plain(input_ids=torch.cat([words, words + 1]), output_attentions=True)
    for row, maps in zip(moved, found.attentions, strict=True):
        assert row["refined_head_similarity"] == pytest.approx(head_similarity(maps.detach()))
        assert abs(row["head_similarity"] - row["refined_head_similarity"]) > 1e-3


def test_the_command_writes_a_table_and_a_picture(tmp_path, tokenizer, capsys):
    for name in ("plain", "refined"):
        model = encoder("bert", AutoModelForMaskedLM, dtype=torch.float32, vocab_size=len(tokenizer))
        (add_refiner(model) if name == "refined" else model).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(
        "good film the plot\nbad plot the cast of\nwarm cast a story\ncold of a story\na\n" + "good film " * 30
    )
    models = [str(tmp_path / name) for name in ("plain", "refined")]
    told = ["--text", str(tmp_path / "text.txt"), "--length", "64", "--out", str(tmp_path / "out")]
    assert features([*models, *told]) == 0 and "2 models, 5 lines" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out/text_features.csv").open()))
    assert [row["model"] for row in rows] == [one for one in models for _ in range(len(rows) // 2)]
    assert (tmp_path / "out/text_features.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "text.txt").write_text("good film the\n")
    assert features([*models, *told]) == 2 and "fewer than four lines" in capsys.readouterr().err
    assert features([str(tmp_path / "none"), *told]) == 2 and "none: holds no tokenizer" in capsys.readouterr().err
