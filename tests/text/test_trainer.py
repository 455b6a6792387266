"""transformers' Trainer trains refined encoders under ZeRO on several processes as one plain loop does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import refiner_ds.text  # noqa: F401  transformers then loads refiners too
from tests.training.launched import ranks


@pytest.mark.slow
def test_two_processes_at_every_stage_are_one_plain_loop_and_have_the_same_statistics(tmp_path):
    done = ranks(Path(__file__).parent / "zero_script.py", tmp_path / "found.json", processes=2, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    sharded, (first, second) = found["sharded"], found["running_means"]
    assert first == second and any(first)
    assert {stage: count > 0 for stage, count in sharded.items()} == {"0": False, "1": False, "2": False, "3": True}
    wanted, begun = load_file(tmp_path / "wanted.safetensors"), load_file(tmp_path / "begun_0/model.safetensors")
    for stage in sharded:
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"stage_{stage}").state_dict()
        assert saved.keys() == wanted.keys()
        distance, way = (
            sum((wanted[name] - one[name]).square().sum() for name in wanted if wanted[name].is_floating_point()) ** 0.5
            for one in (saved, begun)
        )
        assert distance < 1e-4 * way, f"stage {stage}"
