"""The kernels benchmark, in a process that compiles: what the compiler says, and the tensors' bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> dict:
    """Its JSON for Hopper, at sizes of released S."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "refiner_ds.benchmark", "kernels", "--architecture", "90", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


def test_no_kernel_of_released_s_spills_on_hopper(compiled):
    steps = [f"{name}, {mode}" for name in ("map", "bottleneck", "linear") for mode in ("training", "evaluation")]
    assert list(dict.fromkeys(row["step"] for row in compiled["rows"])) == steps
    for row in compiled["rows"]:
        assert row["spilled"] == 0 and 0 < row["registers"] <= 255, row
        assert row["shared"] <= 227 * 1024, row


def test_bytes_are_those_of_the_tensors_a_kernel_is_given(compiled):
    setting, tokens = compiled["setting"], compiled["tokens"]
    made = next(row for row in compiled["rows"] if row["kernel"] == "softmax_map")
    a_map, a_vector, a_row = 2.0, 2 * setting["width"] / tokens, 4 / tokens
    assert made["bytes_entry"] == pytest.approx(2 * a_map + 2 * a_vector + a_row)  # residual, made; q, k; log-sum-exps
