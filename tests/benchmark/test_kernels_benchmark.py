"""The kernels benchmark, in a process that compiles: what the compiler says, and the tensors' bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from refiner_ds.attention.kernels import machine_code
from refiner_ds.gpus import gpu


@pytest.fixture(scope="module")
def compiled() -> dict:
    """Its JSON for Hopper, at sizes of released S."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "refiner_ds.benchmark", "kernels", "--architecture", "90", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


def test_every_kernel_has_a_predicted_time_and_what_bounds_it(compiled):
    """Loops of machine code and of Triton's IR correspond, and no kernel takes less than its bytes."""
    entries = compiled["setting"]["batch"] * compiled["setting"]["heads"] * compiled["tokens"] ** 2
    for row in compiled["rows"]:
        least = 1000 * row["bytes_entry"] * entries / (gpu("h100").bandwidth * 1e9)
        assert row["bound"] in ("instructions", "products", "bytes") and 0 < row["warps"] <= 64
        assert row["predicted"] >= 0.999 * least
        assert row["predicted"] > 1.001 * least or row["bound"] == "bytes"


def test_instructions_of_loops_count_as_often_as_loops_run(monkeypatch):
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;     /* 0x0 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;    /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
        /*0070*/                   NOP;
    """
    monkeypatch.setattr(machine_code, "_print", lambda cubin, option: code)
    ir = """
        %0:2 = scf.for %i = %c0_i32 to %c197_i32 step %c32_i32 iter_args(%a = %b) -> (i32) : i32 {
          scf.for %j = %c0_i32 to %steps step %c1_i32 : i32 {
    """
    outer, inner = 7, 5
    found = machine_code.executed(b"", ir, {"steps": inner})
    assert found.instructions == 3 + outer * (2 + inner * 2)
    assert found.products == outer * inner * 2 * 16 * 8 * 16
    assert machine_code.executed(b"", ir, {}) is None  # a bound that nobody knows
    assert machine_code.executed(b"", "", {}) is None  # loops that the IR does not have


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
